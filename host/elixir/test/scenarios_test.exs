defmodule Bridge.ScenariosTest do
  # What both hosts promise, as the scenarios of tests/scenarios say it, run against this one with real kernels.
  use ExUnit.Case, async: false

  alias Bridge.TestScenarios

  @fails TestScenarios.wrong("fails.json")
  @refused TestScenarios.wrong("refused.json")

  setup_all do
    {:ok, hosts: start_supervised!({DynamicSupervisor, strategy: :one_for_one})}
  end

  setup do
    scratch = Path.join(System.tmp_dir!(), "scenario-#{System.pid()}-#{System.unique_integer([:positive])}")
    File.mkdir_p!(scratch)
    on_exit(fn -> File.rm_rf!(scratch) end)
    {:ok, scratch: scratch}
  end

  for file <- TestScenarios.files(), scenario <- TestScenarios.load!(file) do
    @scenario scenario
    test "#{Path.basename(file, ".json")}: #{scenario["name"]}", %{hosts: hosts, scratch: scratch} do
      TestScenarios.run(unquote(file), @scenario, scratch, hosts)
    end
  end

  for scenario <- TestScenarios.load!(@fails) do
    @scenario scenario
    test "a scenario that expects what is not so fails: #{scenario["name"]}", %{hosts: hosts, scratch: scratch} do
      assert_raise ExUnit.AssertionError, fn ->
        TestScenarios.run(@fails, @scenario, scratch, hosts, patience: 200)
      end
    end
  end

  for %{"name" => name, "file" => content} <- TestScenarios.json!(@refused) do
    @content content
    test "a file that does not fit the schema is refused: #{name}" do
      assert_raise ArgumentError, ~r/two scenarios have one name|does not fit the schema/, fn ->
        TestScenarios.scenarios!(@content, "scenario.json")
      end
    end
  end
end
