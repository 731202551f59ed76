"""``layersample env``: what a bug report needs of the machine and the versions."""

from __future__ import annotations

from layersample.cli.consoles import console, plain


def env_command() -> None:
    """Show the machine and the versions, for a bug report."""
    # Seconds of imports that the other commands don't need.
    import torch

    from layersample.environment import bf16_slowdown, describe_processor, environment
    from layersample.plugins import COMMANDS, SAMPLERS, SETTINGS, installed

    facts = environment()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    packages = {
        f"{entry.dist.name} {entry.dist.version}"
        for group in (COMMANDS, SAMPLERS, SETTINGS)
        for entry in installed(group)
        if entry.dist is not None and entry.dist.name != "layersample"
    }
    lines = {
        **facts["versions"],
        "python": facts["python"],
        "system": facts["system"],
        "processor": f"{describe_processor(facts)}, {facts['cores']} cores, {facts['threads']} torch threads",
        "product in bf16": f"{bf16_slowdown():.2f} of the time of fp32 on the processor",
        "memory": f"{facts['memory_gib']} GiB" if facts["memory_gib"] else "unknown",
        "CUDA": torch.version.cuda or "not in this build of torch",
        "GPUs": ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus) or "none",
        "plug-ins": ", ".join(sorted(packages)) or "none",
    }
    for name, value in lines.items():
        console.print(f"{name}: {plain(value)}", highlight=False, soft_wrap=True)
