"""What is relied on inside of nnU-Net is there: in the version installed, and (slow) in the oldest one supported."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ima_seg.nnunet.compat import SUPPORTED_NNUNET

ROOT = Path(__file__).resolve().parents[1]
TRAINER = "training.nnUNetTrainer.nnUNetTrainer.nnUNetTrainer"
PLANS = "utilities.plans_handling.plans_handler."
#: Class -> attributes that are read.
ATTRIBUTES = {
    TRAINER: "build_network_architecture do_split get_training_transforms run_training",
    f"{PLANS}PlansManager": "plans_name transpose_forward transpose_backward image_reader_writer_class "
    "foreground_intensity_properties_per_channel get_configuration get_label_manager",
    f"{PLANS}ConfigurationManager": "patch_size spacing batch_size normalization_schemes use_mask_for_norm "
    "previous_stage_name preprocessor_class resampling_fn_data resampling_fn_seg network_arch_class_name "
    "network_arch_init_kwargs network_arch_init_kwargs_req_import",
    "utilities.label_handling.label_handling.LabelManager": "num_segmentation_heads has_regions ignore_label "
    "foreground_labels",
    "preprocessing.preprocessors.default_preprocessor.DefaultPreprocessor": "run_case_npy",
    "training.dataloading.nnunet_dataset.nnUNetBaseDataset": "load_case",
}
#: Class -> what its source must mention: attributes that its objects get, and keys of the files that it writes.
MENTIONED = {
    TRAINER: "self.configuration_manager self.label_manager self.plans_manager self.configuration_name "
    "self.dataset_json self.num_epochs self.num_iterations_per_epoch self.num_val_iterations_per_epoch "
    "self.print_to_log_file self.preprocessed_dataset_folder self.dataset_class self.output_folder network_weights "
    "init_args trainer_name inference_allowed_mirroring_axes",
    f"{PLANS}PlansManager": "self.plans",
    "preprocessing.preprocessors.default_preprocessor.DefaultPreprocessor": "class_locations",
}
#: Function -> arguments that are given.
ARGUMENTS = {
    "inference.sliding_window_prediction.compute_gaussian": "tile_size sigma_scale value_scaling_factor device",
    "inference.sliding_window_prediction.compute_steps_for_sliding_window": "image_size tile_size tile_step_size",
    "inference.export_prediction.convert_predicted_logits_to_segmentation_with_correct_shape": "num_threads_torch",
    "preprocessing.cropping.cropping.crop_to_nonzero": "data seg",
    "utilities.label_handling.label_handling.convert_labelmap_to_one_hot": "segmentation all_labels output_dtype",
    "utilities.label_handling.label_handling.determine_num_input_channels": "plans_manager dataset_json",
    "utilities.find_objects.recursive_find_trainer_class_by_name": "",
    "utilities.find_class_by_name.recursive_find_python_class": "folder class_name current_module",
    "utilities.file_path_utilities.get_output_folder": "",
    "run.run_training.get_trainer_from_args": "device",
    "dataset_conversion.convert_MSD_dataset.convert_msd_dataset": "",
}


def found(name):
    module, _, attribute = f"nnunetv2.{name}".rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_what_is_relied_on_exists():
    for name, attributes in ATTRIBUTES.items():
        missing = [attribute for attribute in attributes.split() if not hasattr(found(name), attribute)]
        assert not missing, name
    for name, words in MENTIONED.items():
        source = inspect.getsource(found(name))
        missing = [word for word in words.split() if not re.search(rf"\b{re.escape(word)}\b", source)]
        assert not missing, name
    for name, arguments in ARGUMENTS.items():
        missing = set(arguments.split()) - set(inspect.signature(found(name)).parameters)
        assert not missing, name


def test_nnunet_is_imported_in_its_own_rooms_alone():
    for path in (ROOT / "ima_seg").rglob("*.py"):
        if path.parent == ROOT / "ima_seg" / "nnunet":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.partition(".")[0] == "nnunetv2" for name in names), path


def test_the_installation_asks_for_the_versions_that_are_supported():
    assert f'"nnunetv2{SUPPORTED_NNUNET}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_oldest_supported_version(tmp_path):
    """Needs the package index. Cases, windows and a training, with the oldest release in front of the installed one."""
    oldest = f"nnunetv2=={SUPPORTED_NNUNET.removeprefix('>=').partition(',')[0]}.0"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), oldest]
    subprocess.run(pip, check=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    probe = "import importlib.metadata as m, nnunetv2; print(m.version('nnunetv2'), nnunetv2.__path__[0])"
    asked = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=True)
    assert asked.stdout.split() == [oldest.partition("==")[2], str(tmp_path / "nnunetv2")]
    files = [f"tests/test_{name}.py" for name in ("nnunet_versions", "case", "tiling", "trainer")]
    chosen = ["-m", "not slow", "-k", "not test_trainer or training_leaves"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *chosen],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout and " failed" not in done.stdout
