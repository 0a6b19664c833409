ExUnit.start(capture_log: true, timeout: 120_000)
