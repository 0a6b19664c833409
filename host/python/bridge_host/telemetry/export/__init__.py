"""Out to other systems: files, OpenTelemetry, Prometheus."""
