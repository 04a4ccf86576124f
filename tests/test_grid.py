import pytest

from hf_robustq import Grid


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_number_of_levels(bits):
    assert Grid(bits=bits, narrow=True).levels == 2**bits - 1
    assert Grid(bits=bits).levels == 2**bits
    assert Grid(bits=bits, signed=False).levels == 2**bits
    assert Grid(bits=bits, narrow=True).low == -Grid(bits=bits, narrow=True).high
    assert Grid(bits=bits, signed=False).low == 0


@pytest.mark.parametrize("bits", [1, 17, 0, -4, 4.0, True, "4", None])
def test_bits_outside_2_to_16_are_refused(bits):
    with pytest.raises(ValueError, match="from 2 to 16"):
        Grid(bits=bits)


def test_unsigned_narrow_is_refused():
    with pytest.raises(ValueError, match="narrow"):
        Grid(bits=4, signed=False, narrow=True)
