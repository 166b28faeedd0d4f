"""What a user types, made into what Hydra reads.

Hydra's value syntax gives braces, `=`, spaces and parentheses a meaning of their own; paths and URLs hold
them as plain characters. A value that Hydra can read stays as it is, any other one is put in quotes.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from sam_train import config

CONFIG_DIR_FLAGS = ("--config-dir", "-cd")
MULTIRUN_FLAGS = ("--multirun", "-m")
FLAGS_WITH_VALUE = {"--cfg", "-c", "--package", "-p", "--config-name", "-cn", "--info", "-i"}
GROUPS_NAMED_ALONE = ("model", "data", "experiment")  # of one name in two, the last is meant
EXCLUDED_FROM_NAME = "hydra.job.config.override_dirname.exclude_keys"


class Arguments(NamedTuple):
    """A command line in Hydra's terms.

    Attributes:
        config_dir: the user's folder of recipes, or None.
        hydra: everything else, ready for Hydra.
    """

    config_dir: str | None
    hydra: list[str]

    @property
    def overrides(self) -> list[str]:
        """The `name=value` arguments."""
        return [argument for argument in self.hydra if _is_override(argument)]


def parse(argv: Sequence[str]) -> Arguments:
    """Splits off `--config-dir` and quotes the values that Hydra would misread.

    Raises:
        ValueError: an argument is neither a flag nor `name=value`.
    """
    config_dir, rest = _take_config_dir(argv)
    _check_names(rest)
    parser = OverridesParser.create()
    quoted = [quote(argument, parser) if _is_override(argument) else argument for argument in rest]
    if any(flag in quoted for flag in MULTIRUN_FLAGS):
        quoted.append(_name_jobs_by_what_is_swept(quoted, parser))
    # Hydra's parser wants all overrides in one place; people put flags between them.
    flags = [argument for argument in quoted if not _is_override(argument)]
    return Arguments(config_dir, [*filter(_is_override, quoted), *flags])


def quote(override: str, parser: OverridesParser | None = None) -> str:
    """`name=value` with the value quoted where Hydra cannot read it as it stands."""
    parser = parser or OverridesParser.create()
    name, equals, value = override.partition("=")
    if value.startswith("~/"):  # which not every shell expands after a `=`
        value = os.path.expanduser(value)
    if not equals or not value or _reads(parser, f"{name}={value}"):
        return f"{name}{equals}{value}"
    return f"{name}={','.join(_quote_value(part, parser) for part in _split(value))}"


def _quote_value(value: str, parser: OverridesParser) -> str:
    if _reads(parser, f"x={value}"):
        return value
    if value.startswith("[") and value.endswith("]"):
        items = (_quote_value(item.strip(), parser) for item in _split(value[1:-1]))
        return f"[{','.join(items)}]"
    # Inside quotes a backslash is itself, but for those that stand before a quote.
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{chr(92) * trailing}'"


def _reads(parser: OverridesParser, override: str) -> bool:
    try:
        parser.parse_override(override)
    except HydraException:
        return False
    return True


def _split(value: str) -> list[str]:
    """Parts between the commas that stand outside brackets and quotes."""
    parts, depth, quote_char = [""], 0, ""
    for char in value:
        if quote_char:
            quote_char = "" if char == quote_char else quote_char
        elif char in "\"'" and not parts[-1].strip():
            quote_char = char
        elif char in "[{(":
            depth += 1
        elif char in "]})":
            depth -= 1
        if char == "," and depth == 0 and not quote_char:
            parts.append("")
        else:
            parts[-1] += char
    return parts if depth == 0 else [value]


def _is_override(argument: str) -> bool:
    return argument.startswith("~") or ("=" in argument and not argument.startswith("-"))


def _take_config_dir(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    config_dir, rest, arguments = None, [], iter(argv)
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag not in CONFIG_DIR_FLAGS:
            rest.append(argument)
            continue
        config_dir = value if equals else next(arguments, None)
        if not config_dir or not os.path.isdir(config_dir):
            raise ValueError(
                f"{flag} wants a folder of your own recipes (with model/, data/, experiment/ ... in it), "
                f"got {config_dir or 'nothing'}"
            )
    return config_dir, rest


def _check_names(arguments: Sequence[str]) -> None:
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument.startswith(("-", "~")) or "=" in argument or before in FLAGS_WITH_VALUE:
            continue
        known = {name: group for group in GROUPS_NAMED_ALONE for name in config.options(group)}
        close = difflib.get_close_matches(argument, known, n=1)
        hint = f"; did you mean {known[close[0]]}={close[0]}?" if close else ""
        raise ValueError(f"expected NAME=VALUE, got '{argument}'{hint}")


def _name_jobs_by_what_is_swept(arguments: Sequence[str], parser: OverridesParser) -> str:
    fixed = []
    for argument in filter(_is_override, arguments):
        if _reads(parser, argument):
            override = parser.parse_override(argument)
            if not override.is_sweep_override():
                fixed.append(f"'{override.key_or_group}'")
    return f"{EXCLUDED_FROM_NAME}=[{','.join(fixed)}]"
