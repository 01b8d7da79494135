"""Edit flows in training: recorded paths, losses and gradients; columns of every source; a row's draws are its own."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dllm import DiffusionLM
from dllm.data import Packed
from dllm.diffusion.edits import (
    BLANK,
    DELETE,
    INSERT,
    SUBSTITUTE,
    Columns,
    Draws,
    align_source,
    choose_given,
    draw_poisson,
    log_softplus,
    make_edits,
    number_within,
    show,
    spread,
    sum_edit_losses,
)
from dllm.model import layouts

KINDS = {"SUB": SUBSTITUTE, "DEL": DELETE, "INS": INSERT}
MASK, WORDS = 9, 10


def load(shared, name):
    folder = shared / "golden" / "editflow"
    return json.loads((folder / f"{name}_cases.json").read_text()), np.load(folder / f"{name}.npz")


def pack(rows):
    """Each row a document of its own."""
    lengths = torch.tensor([len(row) for row in rows])
    index = torch.repeat_interleave(torch.arange(len(rows)), lengths)
    return Packed(torch.tensor(sum(rows, [])), F.pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.max()), index,
                  number_within(index))


def recorded_path(z0, z1, uniform, kappa):
    """(columns, which show the text) of a recorded alignment, whose first column is kept."""
    document = torch.cat([torch.full((len(row),), i) for i, row in enumerate(z0)])
    first = number_within(document) == 0
    uniform = torch.cat([drawn[:len(row)] for row, drawn in zip(z0, uniform, strict=True)])
    return (Columns(torch.tensor(sum(z0, [])), torch.tensor(sum(z1, [])), ~first, document),
            first | (uniform < kappa[document]))


def normalised(targets, weight, lengths, packed):
    """The recorded loss: each row divided by its tokens, its given ones too, and the mean of the rows."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), packed.cu_seqlens.diff().long())
    each = (weight / lengths / len(lengths))[document]
    return (targets._replace(rate_weights=each.unsqueeze(1).repeat(1, 3),
                             weights=(weight / lengths / len(lengths))[document][targets.rows]), document)


@pytest.mark.parametrize("index", range(6))
def test_path_edits_loss_and_gradients_are_the_recorded_ones(shared, index):
    cases, z = load(shared, "loss")
    case = cases[index]
    z = {key.removeprefix(case["name"] + "_"): torch.as_tensor(value) for key, value in z.items()
         if key.startswith(case["name"] + "_")}
    rows, weight = case["rows"], z["weight"].clamp(max=case["max_w"] or torch.inf)
    columns, shown = recorded_path([row["z0"] for row in rows], [row["z1"] for row in rows], z["u_z"], z["kappa"])
    text = pack([row["x1"] for row in rows])
    noisy, targets = make_edits(columns, shown, weight[columns.document], 1 - z["t"], "linear", text,
                                inserts_only=False, shift=False)
    assert noisy.tokens.tolist() == sum((row["xt"] for row in rows), [])
    wanted = [(KINDS[kind], int(noisy.cu_seqlens[i]) + place, token or 0)
              for i, row in enumerate(rows) for kind, place, token in row["edits"]]
    kinds = [kind for kind, count in enumerate(targets.counts) for _ in range(count)]
    assert sorted(zip(kinds, targets.rows.tolist(), targets.tokens.tolist(), strict=True)) == sorted(wanted)

    lengths = torch.tensor([len(row["x1"]) if case["normalize_per_position"] else 1.0 for row in rows])
    targets, _ = normalised(targets, weight, lengths, noisy)
    given = [z[name][z["mask"].bool()].clone().requires_grad_() for name in ("raw_rates", "sub_logits", "ins_logits")]
    raw, sub, ins = given
    one, none = torch.eye(sub.shape[1]), torch.zeros(sub.shape[1], sub.shape[1])
    sums = sum_edit_losses(torch.cat((sub, ins), 1), torch.cat((one, none), 1), torch.cat((none, one), 1), raw, targets,
                           backend="reference")
    assert torch.allclose(sums.loss, z["loss"], rtol=2e-5)
    sums.loss.backward()
    for leaf, name in zip(given, ("raw_rates", "sub_logits", "ins_logits"), strict=True):
        expected = z["d_" + name][z["mask"].bool()]
        assert (leaf.grad - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-8


@pytest.mark.parametrize("index", range(2))
def test_a_training_step_of_a_published_model_gives_the_recorded_gradients(shared, index):
    cases, z = load(shared, "train_step")
    case = cases[index]
    model = DiffusionLM.from_pretrained(shared / "golden" / "editflow" / f"model_{case['family']}")
    z = {key.removeprefix(case["family"] + "_"): torch.as_tensor(value) for key, value in z.items()
         if key.startswith(case["family"])}
    t = (1 - case["time_epsilon"]) * z["u_t"]
    weight = (1 / (1 - t + 1e-6)).clamp(max=case["max_w"])
    columns, shown = recorded_path(case["z0"], case["z1"], z["u_z"], t)
    shift = model.config.shift_logits
    noisy, targets = make_edits(columns, shown, weight[columns.document], 1 - t, "linear", pack(case["x1"]),
                                inserts_only=False, shift=shift)
    targets, _ = normalised(targets, weight, torch.tensor([len(row) for row in case["x1"]]), noisy)
    if shift:  # the original has rates of zero for the first place, which no place comes before
        targets.rate_weights[noisy.cu_seqlens[1:].long() - 1, :INSERT] = 0
    hidden = model.hidden_states(noisy.tokens.unsqueeze(0), layouts.Packed(noisy.cu_seqlens, noisy.max_seqlen))
    sums = sum_edit_losses(hidden, model.head_weight, model.insert_head.weight, model.rate_head(hidden), targets)
    assert torch.allclose(sums.loss, z["loss"], rtol=2e-5)
    sums.loss.backward()
    for theirs, ours in (("rate_heads.0.weight", model.rate_head.weight), ("rate_heads.0.bias", model.rate_head.bias),
                         ("sub_logits.weight", model.lm_head.weight), ("ins_logits.weight", model.insert_head.weight),
                         ("model.embed_tokens.weight", model.model.embed_tokens.weight),
                         ("model.norm.weight", model.model.norm.weight),
                         ("model.layers.0.self_attn.q_proj.weight", model.model.layers[0].self_attn.q_proj.weight)):
        expected = z["d_" + theirs]
        assert (ours.grad - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", ["demo_cubic11", "demo_t3"])
def test_rates_with_the_time_in_them_give_the_same_loss_but_for_a_constant(shared, name):
    """Recorded: sum of the rates lambda - w sum log(lambda Q). With lambda = w r ours lacks w log w for each edit."""
    z = np.load(shared / "golden" / "editflow" / "loss_demo.npz")
    z = {key.removeprefix(name + "_"): torch.as_tensor(value) for key, value in z.items() if key.startswith(name)}
    z0, z1, real = ([row[row < 129].tolist() for row in z[side].masked_fill(z[side] == 130, -1)] for side in
                    ("z0", "z1", "z1"))
    weight = (z["dkappa"] / (1 - z["kappa"])).squeeze(1)
    columns, shown = recorded_path(z0, z1, z["u_z"], z["kappa"].squeeze(1))
    noisy, targets = make_edits(columns, shown, weight[columns.document], 1 - z["t"].squeeze(1), "linear",
                                pack([[token for token in row if token >= 0] for row in real]), inserts_only=False,
                                shift=False)
    seen = ~z["pad"]
    assert torch.equal(noisy.tokens, z["xt"][seen])
    targets, document = normalised(targets, weight, torch.ones(3), noisy)
    w = weight[document].unsqueeze(1)
    # The recorded outputs are before softplus and in the order insert, substitute, delete.
    raw = z["raw_rates"][seen].clone().requires_grad_()
    sub, ins = (z[kind][seen].float().clone().requires_grad_() for kind in ("sub_logits", "ins_logits"))
    factored = F.softplus(raw[:, [1, 2, 0]]) / w
    inverse = factored + torch.log(-torch.expm1(-factored))
    one, none = torch.eye(sub.shape[1]), torch.zeros(sub.shape[1], sub.shape[1])
    sums = sum_edit_losses(torch.cat((sub, ins), 1), torch.cat((one, none), 1), torch.cat((none, one), 1), inverse,
                           targets, backend="reference")
    constant = (targets.weights * weight[document][targets.rows].log()).sum()
    assert torch.allclose(sums.loss - constant, z["loss"], rtol=1e-4)
    sums.loss.backward()
    for leaf, kind in ((raw, "raw_rates"), (sub, "sub_logits"), (ins, "ins_logits")):
        expected = z["d_" + kind][seen].float()
        assert (leaf.grad - expected).abs().max() <= 2e-4 * expected.abs().max()


@pytest.mark.parametrize("index", range(8))
def test_localized_edits_spread_as_recorded(shared, index):
    case = json.loads((shared / "golden" / "editflow" / "localized_community.json").read_text())[index]
    began = case["t"] - torch.tensor(case["t_star"], dtype=torch.float64)
    document = torch.zeros(len(began), dtype=torch.long)
    # Uniforms within the step of the distribution function that gives the recorded reaches.
    mean = case["lambda_prop"] * began.clamp(min=0)
    reach = torch.tensor([case["left"], case["right"]], dtype=torch.float64).T
    poisson = torch.distributions.Poisson(mean.clamp(min=1e-30).unsqueeze(1))
    ends = torch.stack([sum((poisson.log_prob(torch.full((len(began), 1), float(k))).exp()
                             for k in range(n)), torch.zeros(len(began), 1)) for n in range(20)])
    uniform = (ends.squeeze(-1).T.gather(1, reach.long()) + ends.squeeze(-1).T.gather(1, reach.long() + 1)) / 2
    shown, neighbours = spread(document, began, uniform, case["lambda_prop"])
    recorded = torch.ones(len(began), dtype=torch.bool)
    recorded[[op["slot"] for op in case["ops"]]] = torch.tensor(case["fired"])
    changed = torch.tensor([a != b for a, b in case["slots"]])
    assert torch.equal((shown | ~changed)[changed], recorded[changed])
    w = min(3 * case["t"]**2 / (1 - case["t"]**3), 20)
    rate = w + case["lambda_prop"] * neighbours
    left = (changed & ~recorded).nonzero().squeeze(1).tolist()
    slots = [op["slot"] for op in case["ops"]]
    assert all(abs(rate[slot] - case["lambda_eff"][slots.index(slot)]) < 1e-4 for slot in left)


def draws_for(packed, seed=0, step=0, first_slot=0):
    return Draws(seed, step, packed.row[packed.cu_seqlens[:-1].long()] + first_slot)


def columns_of(packed, source, length=6, seed=0):
    draws = draws_for(packed, seed)
    given = choose_given(packed, draws)
    return given, align_source(packed, given, draws, source=source, length=length, mask_token_id=MASK, vocab_size=WORDS)


@pytest.mark.parametrize("source", ["empty", "masks", "uniform"])
def test_columns_give_back_the_text_and_the_source_has_its_length(source):
    rows = [[1, *range(2, 2 + n % 7), 8] for n in range(40)] + [[5]]
    packed = pack(rows)
    given, columns = columns_of(packed, source)
    assert torch.equal(columns.after[columns.after != BLANK], packed.tokens)
    kept = ~columns.editable
    assert torch.equal(columns.before[kept], columns.after[kept]) and torch.equal(columns.after[kept],
                                                                                  packed.tokens[given])
    length = {"empty": 0, "masks": 6, "uniform": 6}[source]
    for i, row in enumerate(rows):
        mine = (columns.document == i) & columns.editable
        before, after = columns.before[mine], columns.after[mine]
        assert (before != BLANK).sum() == (length if mine.any() else 0)
        assert not ((before == BLANK) & (after == BLANK)).any()
        wanted = len(row) - int(given[packed.row == i].sum())
        both = ((before != BLANK) & (after != BLANK)).sum()
        assert both == min(wanted, {"empty": 0, "masks": 6, "uniform": 3}[source])
        if source == "masks":
            assert (before[before != BLANK] == MASK).all()
        if source == "uniform":
            assert not (before == MASK).any() and (before < WORDS).all()


def test_deleted_tokens_stand_anywhere_and_the_kinds_come_in_every_order():
    packed = pack([[1, 2, 3]] * 600)
    _, columns = columns_of(packed, "uniform", length=2)
    orders = {}
    for i in range(600):
        mine = (columns.document == i) & columns.editable
        if (columns.after[mine] != BLANK).sum() == 2:  # nothing but the first token is given
            kinds = [("i" if a == BLANK else "d" if b == BLANK else "s")
                     for a, b in zip(columns.before[mine].tolist(), columns.after[mine].tolist(), strict=True)]
            orders["".join(kinds)] = orders.get("".join(kinds), 0) + 1
    assert len(orders) == 6 and min(orders.values()) > 0.08 * sum(orders.values())


def test_what_is_given_is_a_prefix_and_often_a_suffix_and_prompts_of_conversations():
    packed = pack([[1] * 50] * 2000)
    given = choose_given(packed, draws_for(packed)).view(2000, 50)
    assert given[:, 0].all()
    prefix, suffix = given.long().cumprod(1).sum(1), given.flip(1).long().cumprod(1).sum(1)
    assert torch.equal(given.sum(1), (prefix + suffix).clamp(max=50))  # nothing in the middle
    assert abs(((prefix - 1) / 50).mean() - 0.9 * 0.24) < 0.03 and 0.2 < (suffix > 0).float().mean() < 0.45
    learnt = torch.arange(100000).remainder(50) >= 20
    assert torch.equal(choose_given(packed._replace(trainable=learnt), draws_for(packed)), ~learnt)


@pytest.mark.parametrize("propagation", [0.0, 3.0])
def test_a_row_is_corrupted_alike_alone_and_among_others(propagation):
    rows = [[*range(1, 9)], [*range(2, 7)], [*range(1, 8)]]
    times = torch.tensor([0.3, 0.6, 0.8])

    def corrupted(packed, times, first_slot=0):
        draws = draws_for(packed, seed=4, step=2, first_slot=first_slot)
        columns = align_source(packed, choose_given(packed, draws), draws, source="uniform", length=5,
                               mask_token_id=MASK, vocab_size=WORDS)
        shown, weight = show(columns, draws, times, "cube", propagation)
        return make_edits(columns, shown, weight, times, "cube", packed, inserts_only=False, shift=True)

    together, _ = corrupted(pack(rows), times)
    for i, row in enumerate(rows):
        alone, _ = corrupted(pack([row]), times[i:i + 1], first_slot=i)
        assert torch.equal(alone.tokens, together.tokens[together.row == i])


def test_columns_show_the_text_with_the_chance_of_the_schedule():
    packed = pack([[1] * 200] * 200)
    draws = draws_for(packed)
    columns = align_source(packed, torch.arange(40000) % 200 == 0, draws, source="empty", length=0, mask_token_id=MASK,
                           vocab_size=WORDS)
    shown, weight = show(columns, draws, torch.full((200,), 0.4), "cube")
    assert abs(shown[columns.editable].float().mean() - 0.6**3) < 0.01
    assert torch.allclose(weight, torch.tensor(3 * 0.6**2 / (1 - 0.6**3)))
    more, _ = show(columns, draws, torch.full((200,), 0.4), "cube", 2.0)
    assert more.float().mean() > shown.float().mean() and not (shown & ~more).any()


def test_poisson_draws_have_their_mean_and_variance():
    drawn = draw_poisson(torch.full((20000, 1), 2.5), torch.rand(20000, 1, generator=torch.Generator().manual_seed(0),
                                                                 dtype=torch.float64)).double()
    assert abs(drawn.mean() - 2.5) < 0.05 and abs(drawn.var() - 2.5) < 0.1


def test_log_softplus_keeps_value_and_gradient_where_softplus_is_zero():
    x = torch.tensor([-200.0, -40.0, -16.0, -3.0, 0.0, 30.0], dtype=torch.float32, requires_grad=True)
    exact = F.softplus(x.detach().double()).log()
    exact[0] = -200
    got = log_softplus(x)
    assert torch.allclose(got.double(), exact, rtol=1e-6)
    got.sum().backward()
    assert torch.allclose(x.grad[:3], torch.ones(3)) and x.grad.isfinite().all()


def test_every_head_gets_a_gradient_when_a_micro_batch_has_no_such_edit():
    """Processes that share gradients wait for each parameter's."""
    packed = pack([[1]])
    draws = draws_for(packed)
    columns = align_source(packed, choose_given(packed, draws), draws, source="empty", length=0, mask_token_id=MASK,
                           vocab_size=WORDS)
    shown, weight = show(columns, draws, torch.tensor([0.5]), "linear")
    _, targets = make_edits(columns, shown, weight, torch.tensor([0.5]), "linear", packed, inserts_only=True,
                            shift=True)
    assert targets.counts == (0, 0, 0)
    hidden, raw = torch.randn(1, 4, requires_grad=True), torch.randn(1, 3, requires_grad=True)
    heads = [torch.randn(WORDS, 4, requires_grad=True) for _ in range(2)]
    sum_edit_losses(hidden, *heads, raw, targets).loss.backward()
    assert all(x.grad is not None and not x.grad.any() for x in (*heads, hidden, raw))
