"""How good a system is on a data set: metrics, episode lists evaluated to the end, baselines. Never imports torch."""
