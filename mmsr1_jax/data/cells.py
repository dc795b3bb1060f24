"""Conversion of data set cells to text: questions, IDs and gold answers.

null, NaN, NaT, an infinity     empty: such a value has no text, so it is no gold answer
text                            unchanged, with surrounding white space stripped; `None` and `nan`
                                as text are ordinary words
whole number, 1932.0            1932, also in columns of floats (pandas converts whole numbers to
                                floats if a row lacks one) and of decimals
other number, 0.1               its shortest decimal form at the column's own precision, never with
                                an exponent
true, a date, bytes, ..         rejected: the spelling of the answer is unknown
"""

import decimal
import math
import numbers
from typing import Any

import numpy as np
import pyarrow as pa

from mmsr1_jax.utils.checked_json import valid_text

_MAX_EXACT = 2**53  # above this, neighbouring floats are more than 1 apart
_MAX_DIGITS = 400  # maximum number of digits of a whole JSON number that is expanded


def to_text(value: Any) -> str:
    """Return the text of an Arrow or JSON value; "" for null, NaN and infinity.

    Raises:
      ValueError: The value is neither text nor a number, or contains a lone surrogate; the message
        says which.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        text = value.strip()
        if valid_text(text) != text:
            raise ValueError("contains a lone surrogate, which is not valid Unicode")
        return text
    is_number = isinstance(value, (numbers.Real, decimal.Decimal))
    if not is_number or isinstance(value, (bool, np.bool_)):
        raise ValueError(f"must be text or a number, not {type(value).__name__}")
    if isinstance(value, numbers.Integral):
        return str(int(value))
    number: Any = value
    if not math.isfinite(number):
        return ""
    if float(abs(number)) < _MAX_EXACT and number == int(number):
        return str(int(number))
    if isinstance(number, decimal.Decimal):
        text = format(number, "f")
        return text.rstrip("0").rstrip(".") if "." in text else text
    return np.format_float_positional(number, trim="-")


def json_number(text: str) -> str:
    """Return a JSON number as text, for use as `parse_number` of `checked_json.loads`.

    Whole numbers are converted as by `to_text`. Others keep their spelling, because trailing zeros
    may be significant.
    """
    number = decimal.Decimal(text)
    if number.adjusted() < _MAX_DIGITS and number == number.to_integral_value():
        return str(int(number))
    return text


def to_python(scalar: pa.Scalar) -> Any:
    """Return the Python value of an Arrow scalar, as `as_py` does.

    Floats of less than double precision become numpy floats instead, so that 0.1 stays 0.1.

    Raises:
      UnicodeDecodeError: Text is not UTF-8.
    """
    kind = scalar.type
    if not scalar.is_valid:
        return None
    if pa.types.is_float16(kind) or pa.types.is_float32(kind):
        return kind.to_pandas_dtype()(scalar.as_py())
    if isinstance(scalar, pa.StructScalar):
        return {field.name: to_python(scalar[index]) for index, field in enumerate(kind)}
    if isinstance(scalar, pa.ListScalar):
        return [to_python(item) for item in scalar.values]
    return scalar.as_py()
