"""e02: all three functions one after the other, so that what one of them leaves undone shows in the end."""


def there_and_back(student, x):
    """x -> its parameters -> codes -> what the codes stand for."""
    scale, zero_point = student.parameters(x)
    return student.dequantize(student.quantize(x, scale, zero_point), scale, zero_point)
