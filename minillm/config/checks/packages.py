"""Whether an optional package is installed, without importing it."""

from importlib import metadata


def is_installed(distribution: str) -> bool:
    """Whether pip knows a distribution of this name."""
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def missing_packages(*distributions: str) -> list[str]:
    """Those that are not installed."""
    return [name for name in distributions if not is_installed(name)]
