"""The objectives: values and gradients of the originals, and of the formulas in float64, position by position."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dllm.diffusion.corruption import Corruption, corrupt
from dllm.diffusion.expansion import merge_masks
from dllm.diffusion.objectives import choose_targets, sum_alignment, sum_losses, weigh_by_context
from dllm.diffusion_lm import DiffusionLM
from dllm.model.layouts import Packed, Padded
from dllm.training.batches import MicroBatch, forward

OPEN_DLLM = ["single", "packed_block", "packed_full", "ar_packed_block"]


@pytest.mark.parametrize("case_name", OPEN_DLLM)
@pytest.mark.parametrize("checkpoint", ["tied_a", "untied_a"])
def test_loss_and_gradients_equal_open_dllms(shared, checkpoint, case_name, monkeypatch):
    golden = shared / "golden/open_dllm"
    cases = {case["id"]: case for case in json.loads((golden / "train.json").read_text())}
    name = f"{checkpoint}.{case_name}"
    tensors = {key.removeprefix(name + "."): tensor for key, tensor in load_file(golden / "train.safetensors").items()
               if key.startswith(name + ".")}
    model = DiffusionLM.from_pretrained(golden / cases[name]["ckpt"])
    input_ids, labels = tensors["input_ids"].long(), tensors["labels"][0].long()
    cu_seqlens = torch.tensor([0, *cases[name]["doc_lengths"]]).cumsum(0).int()
    ar = case_name.startswith("ar")
    # The golden's labels are the scored tokens (some are the model's own guess); the rest of the row is clean.
    tokens = torch.where(labels == -100, input_ids[0], labels)
    corruption = None
    if not ar:
        ratio = tensors["mask_ratio"][0]
        corruption = Corruption(input_ids[0], labels != -100, ratio, ratio, 1 / ratio)
    targets = choose_targets(tokens, cu_seqlens, corruption, objective="ar" if ar else "mdm", path_term=not ar,
                             shift=True)
    if case_name in ("single", "packed_full"):  # the latter attends across documents, as the original does under SDPA
        layout = Padded(block_length=1 if ar else None)
        monkeypatch.setattr(Padded, "number", lambda self, input_ids: tensors["position_ids"].long())
    else:
        layout = Packed(cu_seqlens, max(cases[name]["doc_lengths"]), block_length=1 if ar else None)
    hidden = model.hidden_states(input_ids, layout)
    sums = sum_losses(hidden, model.head_weight, targets)
    loss = sums.loss / targets.normaliser
    loss.backward()

    assert torch.allclose(loss, tensors["loss"][0], rtol=1e-5)
    first = "ar" if ar else "mdm"
    assert torch.allclose(sums.nll / targets.normaliser, torch.tensor(cases[name]["loss_components"][first]), rtol=1e-5)
    gradients = {k: p.grad for k, p in model.named_parameters()}
    recorded = {k.removeprefix("grad."): v for k, v in tensors.items() if k.startswith("grad.")}
    assert len(recorded) >= 4
    for parameter, expected in recorded.items():
        assert (gradients[parameter] - expected).norm() <= 1e-4 * expected.norm(), parameter
    for parameter, norm in cases[name]["grad_norms"].items():
        assert gradients[parameter].norm().item() == pytest.approx(norm, rel=1e-4), parameter


@pytest.mark.parametrize("checkpoint", ["tied_a", "untied_a"])
def test_alignment_and_its_gradients_equal_open_dllms(shared, checkpoint):
    golden, name = shared / "golden/open_dllm", f"{checkpoint}.repr_align"
    case = next(case for case in json.loads((golden / "train.json").read_text()) if case["id"] == name)
    tensors = {key.removeprefix(name + "."): tensor for key, tensor in load_file(golden / "train.safetensors").items()
               if key.startswith(name + ".")}
    model, teacher = (DiffusionLM.from_pretrained(golden / case["ckpt"]) for _ in range(2))
    # The teacher's input are the original's labels, not those that are the model's own guess, see above.
    input_ids, labels, clean = (tensors[key][0].long() for key in ("input_ids", "labels", "casual_input_ids"))
    ratio = tensors["mask_ratio"][0]
    targets = choose_targets(torch.where(labels == -100, clean, labels), torch.tensor([0, len(clean)]),
                             Corruption(input_ids, labels != -100, ratio, ratio, 1 / ratio), objective="mdm",
                             path_term=True, shift=True)
    seen = []
    teacher.hidden_states = lambda ids, layout, **keys: seen.append(ids) or DiffusionLM.hidden_states(
        teacher, clean.unsqueeze(0), layout, **keys)
    batch = MicroBatch(input_ids.unsqueeze(0), None, len(clean), targets, None, len(clean), 0, 0)
    sums = forward(model, batch, torch.device("cpu"), teacher)
    assert torch.equal(seen[0][0], torch.where(labels == -100, clean, labels))
    alignment = sums.alignment / targets.normaliser
    loss = sums.loss / targets.normaliser + case["repr_align_wt"] * alignment
    loss.backward()

    assert alignment.item() == pytest.approx(case["loss_components"]["repr_align"], rel=1e-5)
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    for parameter, norm in case["grad_norms"].items():
        assert model.get_parameter(parameter).grad.norm().item() == pytest.approx(norm, rel=1e-4), parameter
    recorded = {key.removeprefix("grad."): tensor for key, tensor in tensors.items() if key.startswith("grad.")}
    for parameter, expected in recorded.items():
        assert (model.get_parameter(parameter).grad - expected).norm() <= 1e-4 * expected.norm(), parameter
    assert len(recorded) >= 4 and all(parameter.grad is None for parameter in teacher.parameters())


def test_alignment_equals_its_formula():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, 3, 5, 8, generator=generator, dtype=torch.float64)
    rows = torch.tensor([1, 4, 14])
    got = sum_alignment(list(student.float()), list(teacher.float()), rows)
    expected = 0
    for row in rows:
        for ours, theirs in zip(student.reshape(4, 15, 8)[:, row], teacher.reshape(4, 15, 8)[:, row], strict=True):
            expected += (1 - ours @ theirs / (ours.norm() * theirs.norm())) / 4
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    assert sum_alignment(list(student), list(student), torch.tensor([], dtype=torch.int64)) == 0


def make_batch(lengths=(7, 12, 9), D=8, V=31, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    tokens = torch.randint(V, (T,), generator=generator)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    hidden = torch.randn(T, D, generator=generator, dtype=dtype, requires_grad=True)
    head = torch.randn(V, D, generator=generator, dtype=dtype, requires_grad=True)
    return tokens, cu_seqlens, hidden, head, corrupt(tokens, cu_seqlens, V - 1, generator=generator)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("objective, path_term", [
    ("mdm", False), ("mdm", True), ("elbo", False), ("cart", False), ("expansion", False), ("ar", False)])
def test_every_objective_equals_its_formula_position_by_position(objective, path_term, shift):
    tokens, cu_seqlens, hidden, head, corruption = make_batch()
    targets = choose_targets(tokens, cu_seqlens, None if objective == "ar" else corruption, objective=objective,
                             path_term=path_term, shift=shift, delete_token_id=int(tokens[8]))
    got = sum_losses(hidden.float(), head.float(), targets)
    shift = shift or objective == "ar"
    log_probabilities = (hidden @ head.T).log_softmax(-1)
    expected, possible, scored, deletions = 0, 0, 0, [[], [], []]
    document = [0] * 7 + [1] * 12 + [2] * 9
    for i in range(len(tokens)):
        if shift and i in cu_seqlens[:-1]:
            continue
        possible += 1
        if objective != "ar" and not corruption.corrupted[i]:
            continue
        scored += 1
        nll = -log_probabilities[i - shift, tokens[i]]
        weight = corruption.weight[i] if objective == "elbo" else 1
        if objective == "cart":
            weight = sum(0.5 * 0.3 * 0.7 ** (abs(i - j) - 1) for j in range(len(tokens))
                         if document[i] == document[j] and not corruption.corrupted[j])
        if objective == "expansion":
            weight = 1 - corruption.t[i]
            if tokens[i] == tokens[8]:  # a delete token
                scored -= 1
                deletions[document[i]].append(nll * weight)
                continue
        expected = expected + nll * weight + (nll * (-nll.detach()).exp() / corruption.ratio[i] if path_term else 0)
    expected = expected + sum(sum(mine) / len(mine) for mine in deletions if mine)
    scored += sum(map(bool, deletions))
    assert targets.normaliser == (possible if objective in ("elbo", "cart") else scored)
    assert got.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours = torch.autograd.grad(got.loss, (hidden, head))
    for mine, theirs in zip(ours, torch.autograd.grad(expected, (hidden, head)), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_gradients_are_not_those_of_liger_0_5_8():
    """Liger-Kernel 0.5.8, which Open-dLLM pins, scales every row's gradient by the factor of the first row."""
    tokens, cu_seqlens, hidden, head, corruption = make_batch()
    corruption.corrupted[1:4] = True
    for first_is_scored in (True, False):
        corruption.corrupted[1] = first_is_scored  # shifted: row 0 is about token 1
        targets = choose_targets(tokens, cu_seqlens, corruption, objective="mdm", path_term=True, shift=True)
        loss = sum_losses(hidden.float(), head.float(), targets).loss
        ours, = torch.autograd.grad(loss, hidden)
        nll = F.cross_entropy(hidden @ head.T, targets.tokens, reduction="none") * targets.scored
        upstream = (1 + (-nll.detach()).exp() * targets.path_weights) * targets.scored
        exact, = torch.autograd.grad(nll, hidden, upstream, retain_graph=True)
        ligers, = torch.autograd.grad(nll, hidden, upstream[0].expand_as(nll))
        assert torch.allclose(ours, exact, atol=1e-5)
        assert not torch.allclose(ours, ligers, atol=1e-2)
        if not first_is_scored:
            assert (ligers == 0).all() and (ours != 0).any()


def test_accumulated_micro_batches_equal_the_whole():
    tokens, cu_seqlens, hidden, head, corruption = make_batch(lengths=(7, 12, 9, 4))
    whole = choose_targets(tokens, cu_seqlens, corruption, objective="elbo", shift=True)
    loss = sum_losses(hidden.float(), head.float(), whole).loss / whole.normaliser
    parts, normalisers = [], []
    for start, end, documents in ((0, 19, slice(0, 3)), (19, 32, slice(2, 5))):
        part = Corruption(*(field[start:end] for field in corruption))
        targets = choose_targets(tokens[start:end], cu_seqlens[documents] - start, part, objective="elbo", shift=True)
        parts.append(sum_losses(hidden[start:end].float(), head.float(), targets).loss)
        normalisers.append(targets.normaliser)
    assert sum(normalisers) == whole.normaliser
    assert (sum(parts) / sum(normalisers)).item() == pytest.approx(loss.item(), rel=1e-6)


def test_a_first_token_is_never_a_target_under_shift_and_nothing_crosses_documents():
    tokens, cu_seqlens, _, _, corruption = make_batch()
    corruption.corrupted[:] = True
    targets = choose_targets(tokens, cu_seqlens, corruption, objective="mdm", shift=True)
    assert not targets.scored[cu_seqlens[1:] - 1].any() and targets.scored.sum() == len(tokens) - 3
    assert torch.equal(targets.tokens[targets.scored], tokens[[i for i in range(28) if i not in cu_seqlens]])


def test_nothing_corrupted_gives_zero_and_no_gradient():
    tokens, cu_seqlens, hidden, head, corruption = make_batch()
    corruption.corrupted[:] = False
    targets = choose_targets(tokens, cu_seqlens, corruption, objective="mdm", path_term=True, shift=False)
    sums = sum_losses(hidden.float(), head.float(), targets)
    gradient, = torch.autograd.grad(sums.loss, hidden)
    assert sums.loss == 0 and targets.normaliser == 0 and (gradient == 0).all()


def load_function(shared, name):
    path = shared / "golden/families/functions" / f"{name}.npz"
    return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(path).items()}


def score_logits(logits, tokens, corruption, *, objective, shift=False, trainable=None, documents=None, **keys):
    """Loss sum and its gradient with respect to the model's logits [B, L, V]: the head is the identity."""
    B, L, V = logits.shape
    hidden = logits.clone().requires_grad_()
    cu_seqlens = torch.arange(B + 1) * L if documents is None else documents
    targets = choose_targets(tokens.flatten(), cu_seqlens, corruption, objective=objective, shift=shift,
                             trainable=trainable, **keys)
    sums = sum_losses(hidden, torch.eye(V), targets)
    gradient, = torch.autograd.grad(sums.loss, hidden)
    return sums.loss.detach(), gradient, targets.normaliser


def equal(got, expected):
    return (got - expected).norm() <= 1e-5 * expected.norm()


def test_elbo_equals_lladas_pretraining_loss(shared):
    z = load_function(shared, "loss_llada_pretrain")
    tokens = z["input_ids"]
    corruption = corrupt(tokens.flatten(), torch.arange(4) * 16, int(z["mask_id"]), times=(1 - 1e-3) * z["u_t"] + 1e-3,
                         uniform=z["u_mask"].flatten())
    assert torch.equal(corruption.noisy.view(3, 16), z["noised"])
    loss, gradient, normaliser = score_logits(z["logits"], tokens, corruption, objective="elbo")
    assert normaliser == tokens.numel()
    assert equal(loss / normaliser, z["loss"]) and equal(gradient / normaliser, z["dlogits"])


def test_elbo_of_the_answers_equals_lladas_fine_tuning_loss(shared):
    z = load_function(shared, "loss_llada_sft")
    tokens = z["input_ids"]
    answer = torch.arange(16) >= z["prompt_lengths"][:, None]
    loss, gradient = 0, []
    for row in range(3):  # its mean is over the answer of each row, then over the rows
        corruption = corrupt(tokens[row], torch.tensor([0, 16]), int(z["mask_id"]), uniform=z["u_mask"][row],
                             times=(1 - 1e-3) * z["u_t"][row:row + 1] + 1e-3, maskable=answer[row])
        assert torch.equal(corruption.noisy, z["noised"][row])
        sums, grad, normaliser = score_logits(z["logits"][row:row + 1], tokens[row:row + 1], corruption,
                                              objective="elbo", trainable=answer[row])
        assert normaliser == answer[row].sum()
        loss = loss + sums / normaliser / 3
        gradient.append(grad / normaliser / 3)
    assert equal(loss, z["loss"]) and equal(torch.cat(gradient), z["dlogits"])


@pytest.mark.parametrize("case, schedule, objective", [
    ("token", "linear", "elbo"), ("uniform", "linear", "mdm"), ("shift", "linear", "elbo"),
    ("cosine", "cosine", "elbo"), ("dream_cart", "linear", "cart"), ("batch", "linear", "elbo")])
def test_equals_mdlm_as_the_dllm_library_trains_it(shared, case, schedule, objective):
    z = load_function(shared, "loss_mdlm_dllm")
    tokens, trainable = z["input_ids"], z["labels"].flatten() != -100
    corruption = corrupt(tokens.flatten(), torch.arange(4) * 16, int(z["mask_id"]), schedule=schedule,
                         times=1e-3 + (1 - 1e-3) * z["u_t"], uniform=z["u_mask"].flatten(), maskable=trainable)
    assert torch.equal(corruption.noisy.view(3, 16), z[f"{case}_noised"])
    logits, shift = z[f"{case}_logits"], case in ("shift", "dream_cart")
    loss, gradient, _ = score_logits(logits, tokens, corruption, objective=objective, shift=shift, trainable=trainable)
    if shift:  # it also scores the first token of a row, on its own logits; ours never does
        first = logits[:, 0].clone().requires_grad_()
        weights = corruption.weight if case == "shift" else weigh_by_context(corruption.corrupted, torch.arange(4) * 16)
        weights = (weights * corruption.corrupted).view(3, 16)[:, 0]
        extra = (F.cross_entropy(first, tokens[:, 0], reduction="none") * weights).sum()
        gradient[:, 0] += torch.autograd.grad(extra, first)[0]
        loss = loss + extra.detach()
    # It divides by every token that could be masked, whatever the weights, or by the rows.
    normaliser = 3 if case == "batch" else trainable.sum()
    assert equal(loss / normaliser, z[f"{case}_loss"]) and equal(gradient / normaliser, z[f"{case}_dlogits"])


def test_context_weights_equal_dreams(shared):
    z = load_function(shared, "cart_weight")
    corrupted = z["masked_mask"].flatten()
    for p in (0.1, 0.3, 0.8):
        got = weigh_by_context(corrupted, torch.arange(4) * 14, p)
        assert torch.allclose(got, (z[f"w_p{p}"] * z["masked_mask"]).flatten(), rtol=1e-4, atol=1e-7), p


@pytest.mark.parametrize("shift", [False, True])
def test_losses_by_the_chance_of_being_masked_are_those_of_its_documents(shift):
    torch.manual_seed(0)
    ends = torch.tensor([0, 7, 16, 30])
    tokens, hidden, head = torch.randint(40, (30,)), torch.randn(30, 8), torch.randn(41, 8)
    corruption = corrupt(tokens, ends, 40, times=torch.tensor([0.2, 0.6, 0.74]), uniform=torch.rand(30))
    targets = choose_targets(tokens, ends, corruption, objective="elbo", shift=shift, by_ratio=True)
    by_ratio = sum_losses(hidden, head, targets).by_ratio
    each = F.cross_entropy(hidden @ head.T, targets.tokens, reduction="none") * targets.scored
    each, scored = (values.roll(1) if shift else values for values in (each, targets.scored))
    for quarter, part in ((0, slice(0, 7)), (1, slice(0, 0)), (2, slice(7, 30)), (3, slice(0, 0))):
        torch.testing.assert_close(by_ratio[0, quarter], each[part].sum())
        assert by_ratio[1, quarter] == scored[part].sum()


@pytest.mark.parametrize("case", ["eps1e-3_1", "antithetic", "clipped_0.45_0.95"])
def test_block_diffusion_equals_its_authors_loss(shared, case):
    z = {key.removeprefix(case + "_"): value for key, value in load_function(shared, "loss_bd3lms_original").items()}
    tokens, mask = z["input_ids"], int(z["mask_id"])
    u = z["u_block"] if case == "eps1e-3_1" else (z["u_block"] / 12 + torch.arange(12).view(3, 4) / 12) % 1
    maskable = torch.ones_like(tokens, dtype=torch.bool)
    maskable[:, 0] = False  # the beginning-of-text token, which counts in its mean all the same
    corruption = corrupt(tokens.flatten(), torch.arange(13) * 4, mask, times=(1e-3 + (1 - 1e-3) * u).flatten(),
                         uniform=z["u_mask"].flatten(), maskable=maskable.flatten())
    assert torch.equal(torch.cat((corruption.noisy.view(3, 16), tokens), 1), z["concat"])
    logits = z["logits"].clone()
    logits[..., mask] = -1e6  # its model never predicts the mask
    loss, gradient, normaliser = score_logits(logits, tokens, corruption, objective="block_diffusion")
    assert equal(loss / normaliser, z["loss"]) and equal(gradient / normaliser, z["dlogits"])


def test_block_diffusion_equals_bd3lm_as_the_dllm_library_trains_it(shared):
    z = load_function(shared, "loss_bd3lm_dllm")
    tokens, trainable = z["input_ids"], z["labels"].flatten() != -100
    corruption = corrupt(tokens.flatten(), torch.arange(4) * 16, int(z["mask_id"]), maskable=trainable,
                         times=1e-3 + (1 - 1e-3) * z["u_t"], uniform=z["u_mask"].flatten())  # one time for all blocks
    assert torch.equal(torch.cat((corruption.noisy.view(3, 16), tokens), 1), z["concat_ids"])
    loss, gradient, normaliser = score_logits(z["logits"][:, :16], tokens, corruption, objective="block_diffusion",
                                              trainable=trainable)
    assert equal(loss / normaliser, z["loss"]) and equal(gradient / normaliser, z["dlogits"][:, :16])
    assert (z["dlogits"][:, 16:] == 0).all()


@pytest.mark.parametrize("case", ["linear", "linear_weight_eos"])
def test_expansion_equals_dreamon(shared, case):
    z = load_function(shared, "loss_dreamon")
    t = z["t"].expand(3, 16).flatten()
    corruption = Corruption(z["input_ids"].flatten(), z["loss_mask"].flatten(), t, t, 1 / t)
    # It averages the delete tokens (58) of a whole batch, ours those of a document; its plain loss averages none.
    keys = {"delete_token_id": 58} if case == "linear_weight_eos" else {"delete_token_id": -1}
    loss, gradient, normaliser = score_logits(z["logits"], z["labels"], corruption, objective="expansion", shift=True,
                                              documents=torch.tensor([0, 48]), **keys)
    assert equal(loss / normaliser, z[f"{case}_loss"]) and equal(gradient / normaliser, z[f"{case}_dlogits"])


@pytest.mark.parametrize("case", ["static", "dynamic_inverse", "dynamic_proportional"])
def test_masks_merge_as_in_dreamon(shared, case):
    z = {key.removeprefix(case + "_"): value for key, value in load_function(shared, "dreamon_masking_merge").items()}
    deletion = z["middle_ids"] == 58
    masked = (z["u_mask"] < z["ratio"]) | deletion
    assert torch.equal(torch.where(masked, 60, z["middle_ids"]), z["tokens"])
    share = masked.sum() / len(masked)
    chance = 0.5 * {"static": 1, "dynamic_inverse": 1 - share, "dynamic_proportional": share}[case]
    merging = torch.cat((z["u_merge"] < chance, torch.tensor([False])))
    grown, merged = merge_masks(masked & ~deletion, torch.zeros(22, dtype=torch.long), merging)
    assert torch.equal(z["middle_ids"].masked_fill(grown, 59), z["labels"])
    assert torch.equal(~merged, z["attention"].bool())
