defmodule Bridge.OutputTest do
  use ExUnit.Case, async: true

  alias Bridge.TestKernels

  # What a kernel says at once comes in one piece: its last words and its answer.
  test "what a command prints, yields and displays just before it ends is never lost" do
    test = self()
    name = :"Bridge.Output#{System.unique_integer([:positive])}"
    on_output = &send(test, {:output, &1.command, &1.text})
    start_supervised!({Bridge, name: name, kernels: 1, python: TestKernels.python(), on_output: on_output})
    :ok = Bridge.define("s", "said", "def said(ctx, x):\n    print(x)\n    return x\n", bridge: name)
    :ok = Bridge.define("s", "counted", "def counted(n):\n    yield from range(n)\n", bridge: name)

    for n <- 1..50 do
      assert {:ok, ^n} = Bridge.call("s", "said", [n], bridge: name)
      text = "#{n}\n"
      assert_received {:output, _command, ^text}
    end

    for n <- 1..20 do
      stream = Bridge.stream("s", "counted", [n], bridge: name)
      assert Enum.to_list(stream) == Enum.to_list(0..(n - 1))
    end
  end
end
