"""How templates become HTML: the same settings for every page and fragment, so that no name can break out of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lossledger.ledger.table import clean

if TYPE_CHECKING:
    from jinja2 import Environment


def environment(package: str) -> Environment:
    """The templates of a package: values are escaped and free of control characters, an unknown name is an error.

    Args:
        package: with a folder `templates`.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader(package, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )


def _shown(value: object) -> object:
    return clean(value) if type(value) is str else value
