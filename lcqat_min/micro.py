"""The whole method in one file, without options: the linear weights of a language model become 2-bit codes that train.

    teacher = copy.deepcopy(model)                # Llama-like: model(input_ids=x, use_cache=False).logits
    quantize(model, calibration_batches, seed=0)  # in place; a batch holds token ids [batch, T], without padding
    train(model, training_batches, 60, teacher)   # then pack(model): what to save, by safetensors

Four weights become one byte. Its eight bits are the digits q of a small formula, w_hat = A q + b, with a gradient to
A and b and, by a surrogate, to q. This is what LCQAT(sweeps=0) and TrainConfig(steps) of the package do, with the same
numbers: the same seed gives the same codes, except where two choices are equally good to the last digits. The file
needs torch and nothing else: copied into an empty folder, it runs. Its functions come in the order of the method:

    1 rotate    W_r = U (s_out * W * s_in) U        outliers are spread; weights come close to independent and normal
    2 codebook  repeat: the nearest codewords, then the least-squares (A, b), for weights divided by their row's RMS
    3 moments   H = sum x x^T                       what an error in the weights costs the layer's output: tr(E H E^T)
    4 round     with H = C C^T (Cholesky), for each vector g of d columns, from the last to the first:
                t_g = W_g + sum_{h>g} (W_h - W_hat_h) L_gh^T    carry the errors of later vectors; L_gh^T = C_hg C_gg^-1
                q_g = argmin e^T G_g e,  e = t_g - r (A q + b)  then tr(E H E^T) is the sum of these minima
                Each row keeps the best of a few scales r, with feedback or without it (L = 0, G = I).
    5 refit     the (A, b) of least tr(E H E^T) for these codes; round again at scales nearby; keep it if it is better
    6 layer     W_hat = s_out * U (r (A sign(v) + b)) U * s_in * c    y = x W_hat^T + bias
                The latents v start at the margins of their bits: near 0 where a flip would cost little.
    7 train     AdamW on KL(teacher || model), with d sign(v) / d v taken to be 1 (straight-through)
    8 pack      codes as bytes; r, c, A, b as fp16; s_in and s_out as bits

    symbol       name                    shape          what it is
    W, W_hat     W                       [out, n]       the weights of a layer with n inputs, and what stands for them
    E            error                   [n, out]       W - W_hat, transposed and over r
    d, k         DIM, BITS               4, 8           weights in a vector; bits of its code
    q            digits_of(index)        [..., k]       the bits of a code as -1 and +1, the highest first
    A, b         A, b; book = [A | b]    [d, k], [d]    the codebook of a layer; its 2^k codewords A q + b are `words`
    U            U                       [B, B]         Hadamard matrix, for each block of B columns; its own inverse
    s_in, s_out  signs_in, signs_out     [n], [out]     random signs, -1 and +1
    H            H                       [n, n]         second moments of the rotated inputs, with 1 % damping
    C, L         C, L                    [n, n]         Cholesky factor of H, lower triangular; feedback
    G            G                       [n/d, d, d]    the metric of each vector, C_gg C_gg^T
    t            target                  [n, out]       what is rounded: weights and carried errors, likewise
    r, c         row_scale, col_scale    [out], [n]     scales of the rows of codes, and of the inputs
    v            latent                  [out, n/d, k]  a number for each bit of a code; its sign is the bit

Limits: every nn.Linear except lm_head, with a number of inputs that 4 divides; no Conv1D, no experts fused into one
tensor. The second moments of all layers are in memory at once, 8 n^2 bytes each, and rounding takes about twice as
long as in the package (numpy searches faster). There are no sweeps after rounding, no checkpoints, no mixed precision
and no products with packed codes. The package has all of these, and checks and reports much more.
"""

from collections import abc, namedtuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DIM, BITS = 4, 8
SCALES, NEARBY = (0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.6), (0.95, 1.0, 1.05)  # row scales, over RMS; over the last ones
BYTES, HALVES = ("codes", "signs_in", "signs_out"), ("row_scale", "col_scale", "A", "b")  # of a layer, when packed

# A rounded W: [A | b]; codes int64 [n/d, out]; targets [n, out]; row scales [out]; e H e^T of each row, fp64 [out].
Rounded = namedtuple("Rounded", "book index target scale loss")


def layers_of(model: nn.Module, kind: type) -> dict[str, nn.Module]:
    """The layers of a kind, except lm_head, by name. ValueError where there is none."""
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is kind and "lm_head" not in name}
    if not layers:
        raise ValueError(f"no {kind.__name__} in the model: quantize and unpack take a dense one, train and pack not")
    return layers


def logits_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Token ids, integers [batch, T] -> logits, fp32 [batch * T, vocabulary]."""
    if not isinstance(batch, Tensor) or batch.ndim != 2:
        raise ValueError("a batch must be token ids, integers [batch, T]: cut a tensor of windows by windows.split(8)")
    return model(input_ids=batch.to(next(model.parameters()).device), use_cache=False).logits.float().flatten(0, 1)


# 1 -------------------------------------------------------------------------------------------------------- rotate


def random_signs(width: int, generator: torch.Generator) -> Tensor:
    """-1 and +1, fp32 [width], drawn on the CPU: one seed gives the same signs on every device."""
    return (2 * torch.randint(0, 2, (width,), generator=generator) - 1).float()


def mix(x: Tensor) -> Tensor:
    """x [..., n] times U, block by block: B is the largest power of two that divides n, at most 128."""
    U = torch.ones(1, 1, dtype=torch.float64)
    while len(U) < min(x.shape[-1] & -x.shape[-1], 128):
        U = torch.kron(U.new_tensor([[1, 1], [1, -1]]), U)
    return (x.reshape(-1, len(U)) @ (U / len(U) ** 0.5).to(x)).view(x.shape)


# 2 ------------------------------------------------------------------------------------------------------ codebook


def digits_of(index: Tensor) -> Tensor:
    """Codes 0..255 [...] -> their bits as -1 and +1, fp32 [..., 8], the highest first."""
    return (2 * (index.long().unsqueeze(-1) >> torch.arange(7, -1, -1, device=index.device) & 1) - 1).float()


def index_of(q: Tensor) -> Tensor:
    """The inverse of digits_of, and the codes of latents, whose signs count: [..., 8] -> int64 [...]."""
    return ((q >= 0).long() << torch.arange(7, -1, -1, device=q.device)).sum(-1)


def decode(index: Tensor, book: Tensor) -> Tensor:
    """Codes [...] -> A q + b, fp32 [..., d]."""
    return F.linear(digits_of(index), book[:, :BITS], book[:, BITS])


def frame_planes() -> Tensor:
    """[A | b] where every fit starts: eight columns of one length, A A^T a multiple of I. Good for normal weights."""
    skew = torch.tensor([[0, 1, 1, 1], [-1, 0, 1, -1], [-1, -1, 0, 1], [-1, 1, -1, 0]])
    return F.pad(0.75 * torch.cat([torch.eye(DIM), skew / 3**0.5], dim=1), (0, 1)).float()


def nearest(vectors: Tensor, words: Tensor, metric: Tensor) -> Tensor:
    """Codes, int64 [N], of the nearest of `words` [256, d] to each of `vectors` [N, d] in a metric [d, d].

    (t - w)^T G (t - w) = t^T G t - 2 score, with score = (G w)^T t - (G w)^T w / 2: the largest score is the nearest.
    """
    weighted = words @ metric
    return torch.addmm(-(weighted * words).sum(1) / 2, vectors, weighted.T).max(dim=1).indices


def fit(W: Tensor, rounds: int = 8, most: int = 1 << 14) -> Tensor:
    """The best [A | b] for `most` vectors of W [out, n], whose rows have unit RMS: Lloyd's algorithm with momentum."""
    vectors, book, tried, solved = W.reshape(-1, DIM), frame_planes().to(W.device), [], []
    count = min(most, len(vectors))
    vectors = vectors[torch.arange(count, device=W.device) * (len(vectors) - 1) // max(1, count - 1)]  # evenly spread
    for step in range(rounds + 1):
        index = nearest(vectors, decode(torch.arange(256, device=W.device), book), torch.eye(DIM).to(W))
        tried.append(((vectors - decode(index, book)).square().mean().item(), book))
        q = F.pad(digits_of(index), (0, 1), value=1.0).double()
        normal = q.T @ q + 1e-6 * torch.eye(BITS + 1).to(q)  # a digit may be the same everywhere
        solved.append(torch.linalg.solve(normal, q.T @ vectors.double()).T.float())
        book = solved[-1].clone()
        if step and step < rounds - 2:  # A changes slowly, for many rounds in one direction: go further
            book[:, :BITS] += 0.9 * (solved[-1] - solved[-2])[:, :BITS]
    return min(tried, key=lambda pair: pair[0])[1]


# 3 ------------------------------------------------------------------------------------------------------- moments


def second_moments(model: nn.Module, layers: abc.Iterable[nn.Linear], batches: abc.Iterable[Tensor]) -> dict:
    """Sums of x x^T over the inputs x of each layer, fp64 [n, n]; a common factor of H changes nothing in rounding."""
    sums = {layer: torch.zeros(2 * [layer.in_features]).to(layer.weight).double() for layer in layers}

    def add(layer: nn.Module, inputs: tuple) -> None:
        if layer in sums:
            x = inputs[0].flatten(0, -2).double()
            sums[layer] += x.T @ x

    with nn.modules.module.register_module_forward_pre_hook(add):
        for batch in batches:
            logits_of(model, batch)
    return sums


def factorize(H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """H fp64 [n, n] -> H with 1 % of its mean diagonal added to the diagonal, L [n, n] and G [n/d, d, d], all fp32."""
    H = H + 0.01 * H.diagonal().mean() * torch.eye(len(H)).to(H)
    C = torch.linalg.cholesky(H)
    blocks = torch.stack([C[at : at + DIM, at : at + DIM] for at in range(0, len(C), DIM)])
    L = (torch.linalg.inv(blocks).mT @ C.T.reshape(-1, DIM, len(C))).flatten(0, 1)
    return H.float(), L.float(), (blocks @ blocks.mT).float()


# 4 --------------------------------------------------------------------------------------------------------- round


def ldlq_round(W: Tensor, H: Tensor, L: Tensor, G: Tensor, book: Tensor, scale: Tensor) -> Rounded:
    """Round W [out, n] at one scale for each row [out] with error feedback, exact for vectors (block LDLQ)."""
    words = decode(torch.arange(256, device=W.device), book)
    target = W.T.contiguous() / scale
    error, index = target.clone(), []
    for at in range(len(target) - DIM, -1, -DIM):
        target[at : at + DIM] += L[at : at + DIM, at + DIM :] @ error[at + DIM :]
        index.append(nearest(target[at : at + DIM].T, words, G[at // DIM]))
        error[at : at + DIM] -= words[index[-1]].T
    return Rounded(book, torch.stack(index[::-1]), target, scale, ((H @ error) * error).double().sum(0) * scale**2)


def round_matrix(W: Tensor, H: Tensor, L: Tensor, G: Tensor, book: Tensor, scales: list[Tensor]) -> Rounded:
    """Round each row of W [out, n] at the best of `scales` ([out] each), with feedback or plainly."""
    best = Rounded(book, 0, 0.0, 0.0, torch.inf)
    for scale in scales:
        for feedback, metrics in ((0 * L, torch.eye(DIM).to(G).expand_as(G)), (L, G)):
            new = ldlq_round(W, H, feedback, metrics, book, scale)
            # Row by row: rows are the last dimension of every field but the book.
            best = Rounded(book, *(torch.where(new.loss < best.loss, new[i], best[i]) for i in range(1, 5)))
    return best


# 5 --------------------------------------------------------------------------------------------------------- refit


def refit(W: Tensor, rounded: Rounded, H: Tensor) -> Tensor:
    """The [A | b] of least tr(E H E^T) for given codes and scales, by d (k + 1) normal equations.

    z [out, n/d, k + 1] are the digits times the row's scale, and the scale itself for b. The unknowns (i, j) and (m, l)
    meet in the sum of z_ogj z_ohl H_gi,hm over rows o and pairs of vectors g, h.
    """
    z = F.pad(digits_of(rounded.index.T), (0, 1), value=1.0) * rounded.scale[:, None, None]
    blocks = H.view(-1, DIM, len(H) // DIM, DIM)
    normal = torch.einsum("ogj,ohl,gihm->ijml", z, z, blocks).double().flatten(2).flatten(0, 1)
    normal.diagonal().add_(1e-9 * normal.diagonal().mean())
    right = torch.einsum("ogj,ogi->ij", z, (W @ H).unflatten(1, (-1, DIM))).double().flatten()
    return torch.linalg.solve(normal, right).view(DIM, BITS + 1).float()


# 6 --------------------------------------------------------------------------------------------------------- layer


class QuantLinear(nn.Module):
    """y = x W_hat^T + bias, x [..., n] -> [..., out]. Learned: latent, row_scale, col_scale, A, b and bias, if any."""

    def __init__(self, signs_in: Tensor, signs_out: Tensor, **learned: Tensor | None):
        super().__init__()
        self.register_buffer("signs_in", signs_in)
        self.register_buffer("signs_out", signs_out)
        for name, value in learned.items():
            self.register_parameter(name, None if value is None else nn.Parameter(value.contiguous()))

    def forward(self, x: Tensor) -> Tensor:
        """Decode, scale, rotate back, multiply. v - v.detach() is zero, and passes the gradient of q on to v."""
        q = 2 * (self.latent >= 0).float() - 1 + (self.latent - self.latent.detach())
        W = F.linear(q, self.A, self.b).flatten(1) * self.row_scale[:, None]
        return F.linear(x, mix((mix(W.T) * self.signs_out).T) * (self.signs_in * self.col_scale), self.bias)


def starting_latents(rounded: Rounded) -> Tensor:
    """v = q + A^T e / |a|^2, with e = t - w_hat and a the columns of A, kept on q's side of 0: fp32 [out, n/d, k].

    The squared error changes by 4 |a|^2 q v when a bit flips: by nothing where v is 0.
    """
    A, q = rounded.book[:, :BITS], digits_of(rounded.index.T)
    e = rounded.target.T.unflatten(1, (-1, DIM)) - decode(rounded.index.T, rounded.book)
    return q + (e @ A / A.square().sum(0).clamp(min=1e-12)).clamp(-0.95, 0.95)


def quantize_layer(layer: nn.Linear, H: Tensor, generator: torch.Generator) -> QuantLinear:
    """A linear layer and the second moments of its inputs, fp64 [n, n] -> the quantized layer."""
    s_in, s_out = (random_signs(width, generator).to(H.device) for width in (layer.in_features, layer.out_features))
    H, L, G = factorize(mix(mix(H * s_in.double()).T * s_in.double()))
    W = mix(mix(layer.weight * s_in).T * s_out).T.contiguous()
    rms = W.square().mean(1).sqrt().clamp(min=1e-12)  # a row may be zero
    first = round_matrix(W, H, L, G, fit(W / rms[:, None]), [factor * rms for factor in SCALES])
    again = round_matrix(W, H, L, G, refit(W, first, H), [factor * first.scale for factor in NEARBY])
    best = min(first, again, key=lambda rounded: rounded.loss.sum())
    learned = {"latent": starting_latents(best), "row_scale": best.scale, "col_scale": torch.ones_like(s_in)}
    return QuantLinear(s_in, s_out, A=best.book[:, :BITS], b=best.book[:, BITS], bias=layer.bias, **learned)


@torch.no_grad()
def quantize(model: nn.Module, batches: abc.Iterable[Tensor], seed: int = 0) -> None:
    """Make every nn.Linear except lm_head a QuantLinear, in place: all, or none where an error is raised.

    The model is left in fp32 and in evaluation mode. ValueError for a layer that cannot be quantized, by its name.
    """
    layers, generator = layers_of(model.float().eval(), nn.Linear), torch.Generator().manual_seed(seed)
    moments = second_moments(model, layers.values(), batches)
    for name, layer in layers.items():
        if layer.in_features % DIM or not layer.weight.isfinite().all() or not 0 < moments[layer].trace() < torch.inf:
            raise ValueError(f"{name!r}: 4 must divide its inputs; they and its weights must be finite, not all zero")
    made = {name: quantize_layer(layer, moments.pop(layer), generator) for name, layer in layers.items()}
    for name, layer in made.items():
        model.set_submodule(name, layer)


# 7 --------------------------------------------------------------------------------------------------------- train


def parameter_groups(model: nn.Module) -> list[dict]:
    """AdamW groups, one for each tensor. AdamW moves a number by about its rate in each step, so each rate has a unit.

    Latents: 0.001 bins (2 wide, from -1 to +1). Scales and codebooks: 0.003 of their own RMS. The rest: 0.0005.
    """
    rates: dict[Tensor, float] = {}
    for layer in layers_of(model, QuantLinear).values():
        rates |= {p: 3e-3 * p.square().mean().sqrt().item() for p in (layer.row_scale, layer.col_scale, layer.A)}
        rates |= {layer.latent: 2e-3, layer.b: rates[layer.A]}  # b starts near 0, so A is its measure
    return [{"params": [p], "lr": rates.get(p, 5e-4)} for p in model.parameters()]


def train(model: nn.Module, batches: abc.Iterable[Tensor], steps: int, teacher: nn.Module) -> list[float]:
    """Distil the unquantized teacher into `model`, in place, one batch [batch, T] per step; returns the losses.

    A loss is the KL in nats, mean over tokens. The rates rise in 5 % of the steps and fall in the last 50 %.
    RuntimeError at a gradient that is not finite, before its step; ValueError for too few batches. Dropout stays off.
    """
    up, down, losses = round(0.05 * steps) + 1, round(0.5 * steps) + 1, []
    optimizer = torch.optim.AdamW(parameter_groups(model), betas=(0.9, 0.95), weight_decay=0.0)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / up, (steps - i) / down))
    for _, batch in zip(range(steps), batches, strict=False):
        with torch.no_grad():
            target = logits_of(teacher.eval(), batch).log_softmax(-1)
        loss = F.kl_div(logits_of(model, batch).log_softmax(-1), target, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        rates.step()
        losses.append(loss.item())
    if len(losses) < steps:
        raise ValueError(f"the batches ended after {len(losses)} of {steps} steps: give more batches")
    return losses


# 8 ---------------------------------------------------------------------------------------------------------- pack


def pack(model: nn.Module) -> dict[str, Tensor]:
    """What to save: codes uint8 [out, n/d], signs uint8 [width / 8], scales and codebooks fp16, the rest as it is."""
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, layer in layers_of(model, QuantLinear).items():
        tensors[f"{name}.codes"] = index_of(tensors.pop(f"{name}.latent")).byte()
        for key, signs in layer.named_buffers():
            tensors[f"{name}.{key}"] = index_of(F.pad(signs, (0, -len(signs) % 8)).view(-1, 8)).byte()
        tensors |= {f"{name}.{key}": tensors[f"{name}.{key}"].half() for key in HALVES}
    return tensors


def unpack(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Make an unquantized model, in place, the one that was packed; its latents start on the codes.

    ValueError, before anything is changed, where names or shapes are not those of the model.
    """
    layers, shapes = layers_of(model, nn.Linear), {name: p.shape for name, p in model.named_parameters()}
    for name in layers:
        out, n = shapes.pop(f"{name}.weight")
        own = {"codes": (out, n // DIM), "signs_in": (-(-n // 8),), "signs_out": (-(-out // 8),)}
        own |= {"row_scale": (out,), "col_scale": (n,), "A": (DIM, BITS), "b": (DIM,)}
        shapes |= {f"{name}.{key}": shape for key, shape in own.items()}
    if wrong := shapes.items() ^ {name: tensor.shape for name, tensor in tensors.items()}.items():
        raise ValueError(f"tensors and model differ in {min(wrong)}: unpack into a model like the one that was packed")
    model.load_state_dict(tensors, strict=False)  # what is not quantized: embeddings, norms, biases
    for name, layer in layers.items():
        latent, s_in, s_out = (digits_of(tensors[f"{name}.{key}"]) for key in BYTES)
        signs = s_in.flatten()[: layer.in_features], s_out.flatten()[: layer.out_features]
        halves = {key: tensors[f"{name}.{key}"].float() for key in HALVES}
        model.set_submodule(name, QuantLinear(*signs, latent=latent, bias=layer.bias, **halves).to(layer.weight.device))
