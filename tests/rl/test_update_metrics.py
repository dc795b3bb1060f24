"""Metrics of an update, computed from sums over its tokens."""

from mmsr1_jax.rl.train_batch import update_metrics


def test_sums_are_divided_by_the_number_of_tokens():
    sums = {"tokens": 4.0, "loss": 1.5, "policy_loss": 1.0, "clipped_low": 1.0, "clipped_high": 2.0,
            "kl": 8.0, "log_ratio_squared": 16.0, "gradient_norm": 3.0, "finite": 1.0}  # fmt: skip
    metrics = update_metrics(sums)
    assert metrics["kl"] == 2.0 and metrics["log_ratio_rms"] == 2.0 and metrics["loss"] == 1.5
    assert metrics["clip_fraction"] == 0.75
