"""python -m moe_runtime is the command moe-runtime."""

from .cli import main

main()
