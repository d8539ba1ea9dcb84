"""The faults that the product has to survive, and the tests that inject each: `python tests/fault_matrix.py` runs them.

Rows with slow tests take minutes; the ordinary run has a quick test for every row.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# fault -> tests; a name ends where parameters begin
MATRIX: dict[str, tuple[str, ...]] = {
    "kill -9 while training": (
        "training/test_resume.py::test_killed_and_resumed_ends_in_the_same_bytes",
        "training/test_resume.py::test_twenty_kills_lose_nothing",
        "training/test_train.py::test_resume_never_starts_over_on_top_of_good_weights",
    ),
    "kill -9 while exporting and calibrating": (
        "exporting/test_kill.py::test_a_killed_export_leaves_a_valid_bundle_that_the_next_run_completes",
        "exporting/test_kill.py::test_twenty_kills_each_lose_nothing",
        "test_bundle_together.py::test_what_a_killed_command_left_half_written_is_gone_after_the_next_one",
    ),
    "full disk, I/O error, read-only storage": (
        "test_faults.py::test_a_full_disk_is_recognized_whatever_library_writes",
        "test_faults.py::test_a_full_standard_output_is_one_message",
        "runtime/tensorrt/test_engine_on_disk.py::test_a_full_disk_is_one_error_and_keeps_the_previous_engine",
        "runtime/tensorrt/test_engine_on_disk.py::test_a_write_that_breaks_off_in_the_middle_keeps_the_previous_engine",
        "runtime/tensorrt/test_engine_on_disk.py::test_engines_of_a_read_only_bundle_go_to_the_users_cache",
        "published/test_download.py::test_a_full_disk_is_said_before_anything_is_written",
        "published/test_fetch.py::test_a_disk_without_room_is_one_error",
    ),
    "truncated or corrupt graph, engine, cache, ranges": (
        "runtime/tensorrt/test_engine_validation.py::test_every_flipped_bit_of_a_plan_is_noticed",
        "runtime/tensorrt/test_engine_validation.py::test_a_cut_longer_empty_or_changed_plan_is_refused",
        "storage/test_manifest.py::test_a_flipped_bit_never_changes_the_meaning_unnoticed",
        "evaluation/test_reference.py::test_a_truncated_file_is_refused",
        "published/test_download.py::test_another_digest_leaves_nothing",
        "published/test_fetch.py::test_a_download_that_broke_off_is_one_error_and_goes_on",
        "published/test_fetch.py::test_a_damaged_file_in_the_cache_is_refused_and_replaced",
        "fuzz/test_fuzz.py::test_a_damaged_file_is_read_or_refused_in_one_message",
    ),
    "NaN in weights or activations, a channel of zeros, a constant tensor": (
        "exporting/test_export.py::test_nan_weights_are_refused_before_anything_is_listed",
        "quantization/test_observers.py::test_nan_and_infinity_are_refused_with_the_tensors_name",
        "quantization/test_observers.py::test_a_tensor_that_is_always_zero_has_range_zero",
        "quantization/test_qdq.py::test_a_channel_of_zeros_keeps_its_bias",
        "evaluation/test_verify.py::test_a_graph_that_is_nan_itself_fails_with_advice_that_helps",
    ),
    "NaN in a loss or a matching": (
        "training/test_train.py::test_one_bad_batch_is_skipped_counted_and_named",
        "training/test_train.py::test_a_skipped_step_leaves_every_weight_as_it_was",
        "training/test_train.py::test_bad_batches_in_a_row_end_it_with_the_images_and_keep_the_last_good_checkpoint",
    ),
    "degenerate data": (
        "data/test_images.py::test_truncated_files_are_named_and_never_crash",
        "data/test_bad_coco.py",
        "data/test_bad_yolo_voc.py",
        "quantization/test_calibration.py::test_too_few_images_are_refused_and_few_are_warned_of",
    ),
    "decompression bombs and huge images": (
        "data/test_images.py::test_bombs_are_refused_before_decoding",
        "data/test_image_safety.py",
        "evaluation/test_reference.py::test_a_bomb_takes_no_memory_be_it_in_an_array_that_is_read_or_in_another",
    ),
    "a pickle that runs code": (
        "models/checkpoints/test_pretrained.py::test_damaged_and_malicious_files_are_refused_unexecuted",
        "evaluation/test_reference.py::test_files_of_another_kind_are_refused_and_never_executed",
        "training/test_output.py::test_the_checkpoint_holds_no_pickle",
    ),
    "archives and links that lead out of a bundle": (
        "storage/test_manifest.py::test_a_linked_folder_is_neither_read_nor_written_through",
        "storage/test_manifest.py::test_a_linked_file_is_refused_though_its_content_fits",
        "end_to_end/test_environments.py::test_an_archive_is_named_and_nothing_is_unpacked",
    ),
    "ONNX weights outside of the file": (
        "runtime/test_onnx_bytes.py::test_weights_elsewhere_are_refused_wherever_the_name_hides",
        "runtime/test_onnx_bytes.py::test_a_bundle_with_weights_elsewhere_is_refused_by_every_path_that_opens_it",
    ),
    "eight processes build one engine": (
        "runtime/tensorrt/test_engine_on_disk.py::test_eight_processes_at_once_make_one_engine",
        "runtime/tensorrt/test_engine_on_disk.py::test_a_builder_that_is_killed_leaves_the_previous_engine_and_an_open_lock",
        "test_bundle_together.py::test_a_killed_owner_blocks_nobody",
    ),
    "a stale cache": (
        "runtime/tensorrt/test_select.py::test_what_was_measured_with_another_driver_counts_no_more",
        "runtime/test_bundle_detector.py::test_a_stale_graph_is_refused",
        "runtime/tensorrt/test_engine_validation.py",
        "evaluation/test_verify.py::test_the_verdict_is_stale_once_an_artifact_is_made_again",
    ),
    "a CPU without the instructions of another": (
        "runtime/test_cpu.py::test_only_x86_without_the_instruction_saturates",
        "runtime/test_bundle_detector.py::test_eight_bit_weights_are_warned_of_where_the_cpu_saturates_them",
        "evaluation/test_verify.py::test_a_cpu_that_saturates_int8_judges_no_file_by_openvino_unless_asked",
    ),
    "a GPU without memory, lost, or throttling": (
        "runtime/tensorrt/test_cudart.py::test_out_of_memory_says_how_much_is_free_and_what_to_do",
        "runtime/tensorrt/test_trt_refused.py::test_a_device_without_memory_says_so_and_keeps_nothing",
        "runtime/tensorrt/test_trt_refused.py::test_an_error_that_is_recorded_while_running_is_not_lost",
        "runtime/test_latency.py::test_a_machine_that_changes_its_pace_is_said",
    ),
    "clock, locale, odd and long paths, no inodes": (
        "end_to_end/test_environments.py",
        "test_faults.py::test_a_name_that_is_no_utf8_is_refused_before_anything_is_done",
    ),
    "a compiler that miscompiles": (
        "runtime/tensorrt/test_selftest.py::test_a_wrong_result_gives_exit_code_3_and_names_the_model",
        "runtime/tensorrt/test_selftest.py::test_the_fault_that_a_model_is_there_for_is_far_below_its_floor",
        "runtime/tensorrt/test_selftest.py::test_a_model_that_is_wrong_only_as_a_cuda_graph_is_named_so",
    ),
    "poisoned calibration": (
        "quantization/test_calibration.py::test_saturated_frames_among_dull_ones_raise_the_alarm_and_are_named",
        "quantization/test_calibration.py::test_ordinary_images_are_not_named",
    ),
    "one image in calibration and verification": (
        "exporting/test_export.py::test_a_calibration_image_of_the_verify_split_is_refused_by_its_bytes",
        "exporting/test_export.py::test_calibration_images_saved_again_from_the_verify_split_are_named",
    ),
    "a bound that promises too much": (
        "evaluation/test_bootstrap.py::test_the_bound_holds_about_95_times_in_a_hundred",
    ),
}
HERE = Path(__file__).parent


def main() -> int:
    """Run each row alone; the exit code is 0 where every row holds."""
    failed = []
    for fault, tests in MATRIX.items():
        words = [str(HERE / test) for test in tests]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", "-p", "no:cacheprovider", *words],
            capture_output=True,
            text=True,
            check=False,
            cwd=HERE.parent,
        )
        print(f"{'held  ' if done.returncode == 0 else 'FAILED'} {fault}", flush=True)
        if done.returncode:
            failed.append(fault)
            print(done.stdout[-3000:])
    print(f"{len(MATRIX) - len(failed)} of {len(MATRIX)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
