"""Adds `nm` to `optimum-cli`, which imports every file of this folder at start; so nothing heavy is imported here."""

from optimum_nm.commands import NMCommand

REGISTER_COMMANDS = [NMCommand]
