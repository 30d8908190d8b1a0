"""A file of tensors: written whole or not at all, and what is wrong with one said precisely.

safetensors (0.8) gives every file the mode 600, so that nobody else can read it. Here a file gets the mode of any new
file (umask). safetensors also says that a file is missing where it may not be read. So Python opens it first, whose
error says what it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ..errors import UsageError
from .whole_file import whole_file


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors of any device to `path`, in place of a file of that name; makes its folder if it is missing.

    If it fails (OSError, SafetensorError), what was there before is still there, and nothing else.
    """
    from safetensors.torch import save_file

    with whole_file(path.expanduser()) as file:
        file.touch()
        mode = file.stat().st_mode
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, file, metadata)
        file.chmod(mode)


@contextmanager
def reading(path: Path, remedy: str) -> Iterator[None]:
    """Say what is wrong with `path`, a file of tensors or of JSON, where reading it in here fails.

    remedy: for a file that is missing or damaged. OSError of the same kind for a file that cannot be opened, ValueError
    for damage.
    """
    from safetensors import SafetensorError

    try:
        open(path, "rb").close()
        yield
    except OSError as error:
        raise type(error)(f"{path} cannot be read ({error}): {remedy}") from error
    except (SafetensorError, ValueError, TypeError) as error:
        raise UsageError(f"{path} is truncated or damaged ({error}): {remedy}") from error
