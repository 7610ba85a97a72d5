"""One file a check: ID, TIERS, LIMIT_S (seconds), run(ctx) -> CheckResult. Heavy imports only inside run."""
