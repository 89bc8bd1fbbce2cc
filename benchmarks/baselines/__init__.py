"""Plain formulations, step by step as published: the reference of tests and the opponent of benchmarks."""
