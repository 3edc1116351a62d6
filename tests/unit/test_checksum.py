"""The checksum that readers of filesystems take from the core."""

from stillblock.native import crc32c


def test_crc32c_gives_the_check_value_of_the_polynomial():
    # RFC 3720 B.4: 32 bytes of zeros; and the check value of the Castagnoli polynomial.
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"123456789") == 0xE3069283


def test_crc32c_goes_on_from_what_came_before():
    assert crc32c(b"6789", crc32c(b"12345")) == crc32c(b"123456789")
