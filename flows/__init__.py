"""The story: which steps, in which order. The order itself is the domain's; here its steps are Prefect tasks."""
