"""What a column's Arrow type is good for, whichever of Arrow's several kinds it is."""

from __future__ import annotations

import pyarrow as pa


def plain(type_: pa.DataType) -> pa.DataType:
    """The type of the values, where they stand in a dictionary."""
    return type_.value_type if pa.types.is_dictionary(type_) else type_


def is_text(type_: pa.DataType) -> bool:
    """Text, also as a dictionary."""
    type_ = plain(type_)
    return bool(
        pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_)
    )


def is_text_or_null(type_: pa.DataType) -> bool:
    """Text, or nothing but nulls."""
    return is_text(type_) or bool(pa.types.is_null(plain(type_)))


def is_list(type_: pa.DataType) -> bool:
    """A list of any of Arrow's kinds."""
    return bool(
        pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)
    )
