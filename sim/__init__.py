"""When it happens: lowering, the analytic and the event simulator, reports."""
