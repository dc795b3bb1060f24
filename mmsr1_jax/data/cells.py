"""What a cell of a data set says as text: a question, an id, a gold answer.

null, NaN, NaT, an infinity     nothing: there is no such text, so it is no gold answer
text                            itself, without white space around it; `None` and `nan` as text
                                are words
whole number, 1932.0            1932, also from columns of floats (pandas makes floats of whole
                                numbers where a row has none) and decimals
other number, 0.1               its shortest decimal form, of the column's own precision, never
                                with an exponent
true, a date, bytes, ..         refused: how their answers are written cannot be known
"""

import decimal
import math
import numbers
from typing import Any

import numpy as np
import pyarrow as pa

_EXACT = 2**53  # above it neighbouring floats are more than 1 apart
_MOST_DIGITS = 400  # of a number as JSON writes it


def text_of(value: Any) -> str:
    """Return the text of a value as Arrow or JSON gives it; "" for null, NaN and infinity.

    Raises:
      ValueError: A value that is no text and no number, or half a character; says which.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        text = value.strip()
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError("half a character (a lone surrogate)")
        return text
    is_number = isinstance(value, (numbers.Real, decimal.Decimal))
    if not is_number or isinstance(value, (bool, np.bool_)):
        raise ValueError(f"holds a {type(value).__name__}, not text")
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if not math.isfinite(value):
        return ""
    if float(abs(value)) < _EXACT and value == int(value):
        return str(int(value))
    if isinstance(value, decimal.Decimal):
        text = format(value, "f")
        return text.rstrip("0").rstrip(".") if "." in text else text
    return np.format_float_positional(value, trim="-")


def json_number(text: str) -> str:
    """Return a number of JSON as text: a whole one as `text_of`, another as it is written, as zeros
    at its end may mean something. For `number` of `checked_json.loads`."""
    number = decimal.Decimal(text)
    if number.adjusted() < _MOST_DIGITS and number == number.to_integral_value():
        return str(int(number))
    return text


def value_of(scalar: pa.Scalar) -> Any:
    """Return what an Arrow scalar holds, as `as_py`, but floats of less than double precision as
    numpy's, by which 0.1 stays 0.1.

    Raises:
      UnicodeDecodeError: text that is not UTF-8.
    """
    kind = scalar.type
    if not scalar.is_valid:
        return None
    if pa.types.is_float16(kind) or pa.types.is_float32(kind):
        return kind.to_pandas_dtype()(scalar.as_py())
    if isinstance(scalar, pa.StructScalar):
        return {field.name: value_of(scalar[place]) for place, field in enumerate(kind)}
    if isinstance(scalar, pa.ListScalar):
        return [value_of(item) for item in scalar.values]
    return scalar.as_py()
