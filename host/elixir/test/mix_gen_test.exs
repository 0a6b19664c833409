defmodule Mix.Tasks.Bridge.GenTest do
  @moduledoc "`mix bridge.gen`: what it writes where, what it leaves alone, and that a kernel's answer is what it writes from."
  # Not async: it changes the working directory and Mix's shell.
  use ExUnit.Case, async: false

  alias Mix.Tasks.Bridge.Gen

  @recorded Path.expand("gen/collections.Counter.json", __DIR__)

  setup do
    Mix.shell(Mix.Shell.Process)
    before = File.cwd!()
    dir = Path.join(System.tmp_dir!(), "bridge-gen-#{System.pid()}-#{System.unique_integer([:positive])}")
    File.mkdir_p!(dir)
    File.cd!(dir)

    on_exit(fn ->
      Mix.shell(Mix.Shell.IO)
      File.cd!(before)
      File.rm_rf!(dir)
    end)
  end

  test "the file goes where Elixir looks for the module, formatted as the project is" do
    File.write!(".formatter.exs", "[line_length: 40]")
    Gen.run(["Py.Counter", "collections.Counter", "--inspected", @recorded])
    assert_received {:mix_shell, :info, [_green]}
    source = File.read!("lib/py/counter.ex")
    assert source =~ "defmodule Py.Counter do"
    assert source == IO.iodata_to_binary([Code.format_string!(source, line_length: 40), "\n"])
  end

  test "a file that is there is kept, unless it is told otherwise" do
    File.mkdir_p!("lib")
    File.write!("lib/c.ex", "mine")
    arguments = ["C", "collections.Counter", "--inspected", @recorded]
    assert_raise Mix.Error, ~r/lib\/c.ex is there already/, fn -> Gen.run(arguments) end
    assert File.read!("lib/c.ex") == "mine"
    Gen.run(arguments ++ ["--force"])
    assert File.read!("lib/c.ex") =~ "defmodule C do"
  end

  test "`-` prints it" do
    Gen.run(["C", "collections.Counter", "--inspected", @recorded, "--output", "-"])
    assert_received {:mix_shell, :info, ["defmodule C do\n" <> _]}
    assert File.ls!() == []
  end

  test "what it cannot do anything with is said before a kernel is started" do
    for {arguments, message} <- [
          {[], ~r/takes a module and a Python name/},
          {["dspy.Predict", "dspy.Predict"], ~r/no module's name/},
          {["Kernel", "math"], ~r/there is a module Kernel already/},
          {["Mix.Project", "math"], ~r/there is a module Mix.Project already/},
          {["C", "c", "--bogus"], ~r/--bogus is no option/},
          {["C", "c", "--python"], ~r/--python is no option/},
          {["C", "c", "--inspected", __ENV__.file], ~r/holds no answer/}
        ] do
      assert_raise Mix.Error, message, fn -> Gen.run(arguments) end
    end
  end

  test "a kernel is asked, what it said can be kept, and what was written calls it" do
    python = Bridge.TestKernels.python()
    Gen.run(["Py.Counter", "collections.Counter", "--python", python, "--save", "counter.json"])
    kept = "counter.json" |> File.read!() |> Bridge.JSON.decode()
    assert {:ok, %{"name" => "collections.Counter", "kind" => "class"}} = kept

    [{counter, _}] = Code.compile_file("lib/py/counter.ex")
    start_supervised!({Bridge, name: __MODULE__.Host, kernels: 1, python: python})
    {:ok, ref} = counter.create(["banana"], session: Bridge.session("gen", bridge: __MODULE__.Host))
    assert {:ok, nil} = counter.update(ref, ["bandana"])
    assert {:ok, [{"a", 6}]} = counter.most_common(ref, n: 1)
    assert {:ok, 6} = counter.setdefault(ref, "a", [1])
  end

  test "a name that Python does not have is said in Bridge's words, and no file is written" do
    arguments = ["C", "collections.Nothing", "--python", Bridge.TestKernels.python()]
    assert_raise Mix.Error, ~r/Nothing/, fn -> Gen.run(arguments) end
    refute File.exists?("lib")
  end
end
