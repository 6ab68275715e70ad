"""How the workers of one job find each other."""

TIMEOUT_S = 60


def join(port, process_id, num_processes):
    """Makes this process one of a job on this machine; before devices are used."""
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator_address=f"127.0.0.1:{port}",
        num_processes=int(num_processes),
        process_id=int(process_id),
        initialization_timeout=TIMEOUT_S,
    )
