"""`python -m optimum_nm` is `optimum-cli nm`."""

from __future__ import annotations

import sys

from optimum.commands.base import RootOptimumCLICommand

from .commands import NMCommand


def main() -> None:
    root = RootOptimumCLICommand("python -m optimum_nm")
    for command in NMCommand.SUBCOMMANDS:
        root.register_subcommand(command)
    args = root.parser.parse_args()
    if not hasattr(args, "func"):
        root.parser.print_help(sys.stderr)
        sys.exit(2)
    args.func(args).run()


if __name__ == "__main__":
    main()
