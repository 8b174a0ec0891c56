"""The progress bar, whose library is optional."""

from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(total: int, unit: str, argument: str, off: object) -> "tqdm[NoReturn]":
    """A bar of so many units, wanted by an argument that is `off` without one."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"a progress bar needs tqdm: pip install 'jaxsoftmax[train]', or pass {argument}={off}"
        ) from error
    return tqdm(total=total, unit=unit)
