"""Arrays on the device as kernels take them, classes last and in rows: themselves, views, or copies by its library."""

from fastxent import checks
from fastxent.backends.cuda import resident
from fastxent.backends.cuda.arrays import lies_in_line


def in_rows(array, axis, library):
    """An array so arranged, for a library that can; else itself, if its classes are last."""
    shape = library.view(array).shape
    if axis in (-1, len(shape) - 1):
        moved = array
    elif hasattr(library, "classes_last"):
        moved = library.classes_last(array, axis)
    else:
        raise ValueError(f"axis must be the last of arrays on a device that are not torch's or cupy's; got {axis}")
    if _lies_so(moved, library) or not hasattr(library, "contiguous"):
        return moved
    return library.contiguous(moved)


def targets_in_rows(targets, logits, axis, library):
    """Targets so arranged: probabilities like logits, and as what these are computed with; indices in one line."""
    if type(targets) is not type(logits) or not hasattr(library, "converted"):
        return targets
    view, about = library.view(logits), library.view(targets)
    if not checks.is_floating(about.dtype):
        return targets if lies_in_line(about) else library.contiguous(targets)
    if len(about.shape) != len(view.shape):
        return targets
    return library.converted(in_rows(targets, axis, library), checks.loss_dtype(view.dtype))


def place_for(out, logits, rows, axis, library):
    """Where to write what the caller wants in ``out``, given logits and their `in_rows`: ``out`` itself, a view of it,
    or where it does not lie in rows a new array, for `handed_back` to copy; None for none.
    """
    if out is None:
        return None
    if out is logits:
        return rows
    if type(out) is not type(logits) or not hasattr(library, "contiguous"):
        return out
    view, about = library.view(logits), library.view(out)
    own, real = checks.gradient_dtype(view.dtype), checks.loss_dtype(view.dtype)
    if about.shape != view.shape or about.dtype not in (own, real):
        raise ValueError(
            f"out on a device must be {own} or {real} of shape {view.shape}; got {about.dtype} of shape {about.shape}"
        )
    moved = out if axis in (-1, len(view.shape) - 1) else library.classes_last(out, axis)
    if _lies_so(moved, library):
        return moved
    return library.empty(out, library.view(moved).shape, about.dtype)


def handed_back(found, out, place, axis, library):
    """What was written, in the place and the order of axes that the caller wants."""
    if out is not None and library.view(place).address == library.view(out).address:
        return out
    turned = found if axis in (-1, len(library.view(found).shape) - 1) else library.classes_back(found, axis)
    if out is None:
        return turned
    library.write(out, turned)
    return out


def _lies_so(array, library):
    return resident.lies_in_rows(library.view(array))
