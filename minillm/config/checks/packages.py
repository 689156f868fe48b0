"""Installed packages, looked for without importing them."""

from importlib import metadata


def is_installed(distribution: str) -> bool:
    """True where pip knows a distribution of this name."""
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def missing_packages(*distributions: str) -> list[str]:
    """The distributions among these that are not installed."""
    return [name for name in distributions if not is_installed(name)]
