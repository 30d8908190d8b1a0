"""Mistakes that the check of notebook 00 must catch."""


def forgets_that_a_byte_has_eight_bits(weights, bits):
    return weights * bits / 1_000_000


def binary_megabytes(weights, bits):
    return weights * bits / 8 / 2**20


def bytes_instead_of_megabytes(weights, bits):
    return weights * bits / 8


def whole_bits_only(weights, bits):
    return weights * round(bits) / 8 / 1_000_000


def returns_nothing(weights, bits):
    print(weights * bits / 8 / 1_000_000)


WRONG = {
    "megabytes": [
        forgets_that_a_byte_has_eight_bits,
        binary_megabytes,
        bytes_instead_of_megabytes,
        whole_bits_only,
        returns_nothing,
    ]
}
