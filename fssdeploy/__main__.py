"""`python -m fssdeploy`: the same command, for launchers that start modules (torchrun)."""

from fssdeploy.cli.main import main

main()
