"""What is said and drawn at the end of a run."""

from minift.study.plots.runs import loss_curve, run_curves
from minift.train.loop import TrainResult


def outcome(result: TrainResult, model: str) -> str:
    """Draw the curves of a finished run into its folder, and say in a few lines how it ended and how to go on."""
    steps, output = result.steps, result.output_dir
    pictures = [loss_curve(steps, f"{model}: training loss").save(output / "loss.png")]
    pictures.append(run_curves(steps, model).save(output / "curves.png"))
    lines = [f"Loss {steps[0].loss:.3f} -> {steps[-1].loss:.3f} in {len(steps)} steps"]
    if result.stopped_early:
        lines.append("Stopped early: the evaluation loss no longer fell")
    looked_at = steps[result.weights_of - 1]
    if looked_at.eval_loss is not None:
        lines.append(
            f"Evaluation of the weights of step {looked_at.step}: loss {looked_at.eval_loss:.3f}, perplexity "
            f"{looked_at.eval_perplexity:.2f}, {looked_at.eval_accuracy:.1%} of the trained tokens right"
        )
    files = ", ".join(str(path) for path in [*pictures, output / "log.json"])
    lines.append(f"Saved {result.adapter} (adapter, PEFT's format), {files}")
    lines.append(f"Try it: minift chat --model {model} --adapter {result.adapter}")
    lines.append(f"Do it again: minift train --like {output} --output-dir {output}-again")
    return "\n".join(lines)
