# What is waited for is waited for, on a machine that does other things too; only what never comes takes that long.
ExUnit.start(capture_log: true, timeout: 300_000, assert_receive_timeout: 60_000)
