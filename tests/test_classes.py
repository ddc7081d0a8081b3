"""Every class of cache code: models that are taken, and models that are rightly refused."""

from __future__ import annotations

import pytest
import torch

import cachefree

from .assertions import Unchanged, graph_is_plain, says_what_to_do
from .models import CASES, REFUSALS, encoder_decoder
from .models.by_class import REFUSED, TAKEN, Refused
from .models.kept import KEPT, KeptCase
from .test_lifting import REFUSED as LIFTED_REFUSED
from .test_lifting import equal_sequences, rewritten_from


@pytest.mark.parametrize("case", TAKEN, ids=str)
def test_taken_model_equals_the_model(case: KeptCase) -> None:
    model = case.build()
    rewritten = rewritten_from(case, model)
    assert rewritten.report.verdict.is_proof, rewritten.report
    graph_is_plain(rewritten.graph_module)
    assert equal_sequences(case, model, [rewritten]) >= 10


@pytest.mark.parametrize("refused", REFUSED, ids=str)
def test_refused_model_is_refused(refused: Refused) -> None:
    model = refused.build()
    unchanged = Unchanged(model)
    with pytest.raises(cachefree.CacheFreeError) as caught:
        cachefree.rewrite(model, refused.example, **refused.options)
    unchanged.check()
    for text in refused.says:
        assert text in str(caught.value), str(caught.value)
    says_what_to_do(caught.value)
    assert torch.is_grad_enabled()


# Every class of `PATTERNS` → models that are taken, and models that are refused, by name. The
# models are those of `CASES`, `REFUSALS`, `KEPT`, `TAKEN`, `REFUSED` and of the tests named there.
CLASSES: dict[str, tuple[str, str]] = {
    "P1 join": ("nano_gpt llama casts_off", "newest_first rounded_keys"),
    "P2 past length": ("gpt2_with_transposed_keys", "positions_off_by_one"),
    "P3 list of None": ("chatglm_mask_by_lengths", "past_of_some_layers_only"),
    "P4 cross-attention": (
        "TranslationDecoder FusedMemoryDecoder ClassConditioned",
        "other_values_of_the_encoder",
    ),
    "P5 mems": (
        "glm_mems_with_two_cases poses_with_remembered_inputs",
        "newest_forgotten window_off_by_one",
    ),
    "P6 dict": ("dict_by_uuid dict_by_number", "late"),
    "P7 module state": (
        "attributes list_and_flag counted_in_place weights_to_look_at registry",
        (
            "counter_on_the_module counting used weights_that_are_read registry_that_matters "
            "registry_half_filled"
        ),
    ),
    "P8 conv and recurrent state": (
        "token_shift convolution_that_pads_itself states_and_windows",
        "padded_on_both_sides averaged_state loop_over_tokens",
    ),
    "P9 one token": ("causal_flag_then_one_token one_token_with_a_state", "one_token retention"),
    "P10 flags": ("use_cache_off_by_default", "cached_is_otherwise"),
    "P11 integer tests": ("opt_mask_for_several_tokens bloom", "bias_of_later_calls"),
    "P12 preallocated": (
        "rows_at_start_pos narrowed_rows fixed_buffer_at_positions",
        "ring whole_buffer indexed",
    ),
    "P13 hooks": ("dict_by_module_from_hooks", "hooks_that_count"),
    "P14 cache object": ("store dataclasses", "average_over_calls"),
    "P15 mask": ("opt_mask_left_out", "windows_of_two_lengths"),
    "P16 input cut": ("cut_to_the_last_token all_tokens", "cut_by_two last_logits_only"),
    "P17 first of an iterator": ("unrotated_keys_in_one_tensor", "next_of_an_iterator"),
    "P18 empty sentinel": (
        "empty_tuple_as_default zero_size_tensor_as_default",
        "empty_is_another empty_history",
    ),
    "P19 string or deque": ("deque", "a_string_at_first"),
    "P20 nested None": ("nones_inside_the_cache states_and_windows", "some_nones"),
    "P21 first value of the inputs": (
        (
            "first_frame_by_a_flag first_frame_repeated padded_by_replication "
            "state_from_the_mean_of_the_inputs differences_of_frames level_of_the_first_frame"
        ),
        "first_frames_mirrored two_first_values_of_one_state first_chunk_scaled",
    ),
    "P22 attended first value": (
        "memories_of_zeros memories_that_are_learned rows_of_zeros_before_the_tokens",
        "attended_zero_row",
    ),
}


def test_every_class_has_models_that_are_taken_and_refused() -> None:
    taken = {case.name for case in (*CASES, *KEPT, *TAKEN)} | {
        name for name in vars(encoder_decoder) if name[0].isupper()
    }
    refused = {case.name for case in (*REFUSALS, *REFUSED)} | {case[0] for case in LIFTED_REFUSED}
    assert [int(name.split()[0][1:]) for name in CLASSES] == list(range(1, 23))
    for name, (accepts, refuses) in CLASSES.items():
        assert set(accepts.split()) <= taken, name
        assert set(refuses.split()) <= refused, name
        assert accepts
        assert refuses
    assert len(taken | refused) >= 60
