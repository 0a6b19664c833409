# One life of a scenario, which this process of the operating system ends with.
Bridge.TestScenarios.die(System.argv())
