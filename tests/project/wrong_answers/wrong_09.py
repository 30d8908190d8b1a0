"""Mistakes that students make in notebook 09."""

import torch


def from_the_low_end(octets, bits, count):
    text = "".join(f"{octet:08b}"[::-1] for octet in octets)
    return [int(text[n * bits : (n + 1) * bits][::-1], 2) for n in range(count)]


def leading_zeros_lost(octets, bits, count):
    text = "".join(bin(octet)[2:] for octet in octets)
    return [int(text[n * bits : (n + 1) * bits] or "0", 2) for n in range(count)]


def indices_stay_in_bytes(octets, bits, count):
    each = max(1, 8 // bits)
    found = [octet >> 8 - bits * (n + 1) & (1 << bits) - 1 for octet in octets for n in range(each) if bits <= 8]
    return found[:count]


def filling_not_cut(octets, bits, count):
    text = "".join(f"{octet:08b}" for octet in octets)
    return [int(text[start : start + bits], 2) for start in range(0, len(text), bits)]


def nothing_rounded_up(rows, columns, dim):
    return 2 + (16 * (2 * dim**2 + dim) + 17 * (rows + columns)) / (rows * columns)


def code_bytes(rows, columns, dim):
    vectors = -(-columns // dim)
    return rows * -(-vectors * 2 * dim // 8)


def four_bytes_a_number(rows, columns, dim):
    codes, numbers = code_bytes(rows, columns, dim), 2 * dim**2 + dim + rows + columns
    return 8 * (codes + 4 * numbers + -(-rows // 8) + -(-columns // 8)) / (rows * columns)


def column_scales_forgotten(rows, columns, dim):
    codes, numbers = code_bytes(rows, columns, dim), 2 * dim**2 + dim + rows
    return 8 * (codes + 2 * numbers + -(-rows // 8) + -(-columns // 8)) / (rows * columns)


def in_nats(index, bits):
    p = torch.bincount(index.flatten(), minlength=1 << bits).double() / index.numel()
    return -(p[p > 0] * p[p > 0].log()).sum().item()


def not_a_number(index, bits):
    p = torch.bincount(index.flatten(), minlength=1 << bits).double() / index.numel()
    return -(p * p.log2()).sum().item()


def a_weight_instead_of_a_vector(index, bits):
    p = torch.bincount(index.flatten(), minlength=1 << bits).double() / index.numel()
    return -(p[p > 0] * p[p > 0].log2()).sum().item() / (bits / 2) / 2


WRONG = {
    "unpack_row": [from_the_low_end, leading_zeros_lost, indices_stay_in_bytes, filling_not_cut],
    "bits_a_weight": [nothing_rounded_up, four_bytes_a_number, column_scales_forgotten],
    "code_entropy": [in_nats, not_a_number, a_weight_instead_of_a_vector],
}
