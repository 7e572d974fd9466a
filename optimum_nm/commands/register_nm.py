"""Adds `nm` to `optimum-cli`: installed into optimum/commands/register, whose files it imports at every start.

Kept outside a folder `optimum/` of the repository, which an editable install would put on the path as a second copy.
"""

from optimum_nm.commands import NMCommand

REGISTER_COMMANDS = [NMCommand]
