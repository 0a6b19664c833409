defmodule Bridge.Error.WireTest do
  use ExUnit.Case, async: true

  defmodule Broken do
    defexception [:value]
    @impl true
    def message(_exception), do: raise("broken")
  end

  alias Bridge.{Error, JSON, TestKernels}
  alias Bridge.Error.Wire

  {:ok, vectors} = Path.expand("../../../../tests/vectors/errors.json", __DIR__) |> File.read!() |> JSON.decode()
  @errors vectors["errors"]
  @examples vectors["examples"]

  test "the errors of the vectors are the table" do
    table = for {code, name, retryable, summary, _remedy} <- Error.table(), do: {code, name, retryable, summary}

    assert Enum.sort(table) ==
             Enum.sort(for e <- @errors, do: {e["code"], snake(e["name"]), e["retryable"], e["summary"]})

    assert length(table) > 30
  end

  for %{"code" => code, "name" => name} <- @errors do
    test "#{name} is #{code} on the wire, whatever it says" do
      {code, type, name} =
        unquote(Macro.escape({code, "bridge." <> name, name |> Macro.underscore() |> String.to_atom()}))

      error = Error.new(name, "it", remedy: "do")
      assert %{"code" => ^code, "data" => %{"type" => ^type}} = Wire.to_wire(error)
      assert Wire.from_wire(Wire.to_wire(error)) == error
      assert Wire.from_wire(%{"code" => code, "message" => "it"}) == Error.new(name, "it")
    end
  end

  for example <- @examples do
    test "the error object of the vectors comes back as it went: #{example["name"]}" do
      example = unquote(Macro.escape(example))
      error = Wire.from_wire(example["error"])
      assert error.name == snake(example["raises"])

      again = Wire.to_wire(error)
      assert again["message"] == example["text"]
      if example["exact"], do: assert(again == example["error"])
    end
  end

  test "a code that this host does not know keeps its words" do
    error = Wire.from_wire(%{"code" => -32050, "message" => "m", "data" => %{"type" => "bridge.New", "message" => "m"}})
    assert %Error{name: :internal_error, type: "bridge.New", message: "m", remedy: ""} = error
  end

  test "an error without a type has its own" do
    assert %Error{type: "bridge.NotFound", message: "m"} =
             Wire.from_wire(object(%{"type" => "", "message" => "m"}, -32005))
  end

  test "what is no error object is said to be none" do
    data = %{"type" => "T", "message" => "m"}
    frame = %{"file" => "f", "line" => 1, "function" => "g"}

    assert {:ok, %Error{traceback: [%{code: ""}]}} = Wire.read(object(Map.put(data, "traceback", [frame])))

    for wrong <- [
          nil,
          "x",
          [],
          %{},
          %{"code" => "1", "message" => ""},
          %{"code" => 1.0, "message" => ""},
          %{"code" => 1},
          object("x"),
          object(%{}),
          object(%{"type" => "T"}),
          object(%{data | "type" => 1}),
          object(Map.put(data, "remedy", nil)),
          object(Map.put(data, "retryable", "yes")),
          object(Map.put(data, "traceback", %{})),
          object(Map.put(data, "traceback", [1])),
          object(Map.put(data, "traceback", [%{frame | "line" => "1"}])),
          object(Map.put(data, "traceback", [Map.put(frame, "code", 1)])),
          object(Map.put(data, "traceback", [Map.delete(frame, "file")]))
        ] do
      assert Wire.read(wrong) == :error
      assert %Error{name: :internal_error} = Wire.from_wire(wrong)
    end
  end

  describe "an exception of the host's code" do
    test "is a tool error with its class, its text and its frames, outermost first" do
      error = caught(fn -> inner() end)

      assert %Error{name: :tool_error, code: -32001, type: "ArgumentError", message: "bad", remedy: ""} = error
      assert [outer, inner] = error.traceback |> Enum.map(& &1.function) |> Enum.take(-2)
      assert outer =~ "caught/1"
      assert inner =~ "inner/0"
      assert %{file: "test/wire/errors_test.exs", line: line} = List.last(error.traceback)
      assert line > 1
      assert Wire.to_wire(error)["message"] == "ArgumentError: bad"
    end

    test "without a text is its class alone" do
      error = Wire.from_exception(%RuntimeError{message: ""}, [])
      assert %{"message" => "RuntimeError", "data" => %{"message" => ""}} = Wire.to_wire(error)
    end

    test "shows no argument in its frames, for they are values" do
      secret = String.duplicate("s3cret", 3)
      error = caught(fn -> apply(String, :to_integer, [secret, secret]) end)
      refute inspect(error) =~ "s3cret"
      error = caught(fn -> only_integers(String.to_charlist(secret)) end)
      assert error.type == "FunctionClauseError"
      refute inspect(error.traceback) =~ inspect(String.to_charlist(secret))
    end

    test "has both ends of a recursion, 64 frames, and says how many are left out" do
      stacktrace = for n <- 1..1000, do: {__MODULE__, :"f#{n}", 0, [file: ~c"x.ex", line: n]}
      error = Wire.from_exception(%RuntimeError{message: "deep"}, stacktrace)
      assert length(error.traceback) == 64
      assert hd(error.traceback).line == 1000
      assert List.last(error.traceback).line == 1
      assert %{file: "…", line: 0, function: "(937 frames left out)"} = Enum.at(error.traceback, 32)
      assert error |> Wire.to_wire() |> get_in(["data", "traceback"]) |> length() == 64

      exactly = Wire.from_exception(%RuntimeError{message: "deep"}, Enum.take(stacktrace, 64))
      refute Enum.any?(exactly.traceback, &(&1.file == "…"))
    end

    test "that is an error of Bridge's stays what it is" do
      error = Error.new(:not_found, "gone")
      assert Wire.from_exception(error, [{__MODULE__, :f, 0, []}]) == error
    end

    test "that came from Python has the host's frames before its own" do
      python = Error.new(:remote_error, "bad", type: "ValueError", traceback: [frame("x.py")])
      error = Wire.from_exception(python, [{__MODULE__, :f, 0, [file: ~c"a.ex", line: 1]}])
      assert %Error{type: "ValueError", traceback: [%{file: "a.ex"}, %{file: "x.py"}]} = error
    end

    test "may be of another kind than an exception" do
      assert %Error{type: "throw", message: "{:no, 1}"} = Wire.from_caught(:throw, {:no, 1}, [])
      assert %Error{type: "exit", message: "no process" <> _} = Wire.from_caught(:exit, :noproc, [])

      assert %Error{type: "ArithmeticError", name: :remote_error} =
               Wire.from_caught(:error, :badarith, [], :remote_error)
    end

    test "whose own message cannot be made is still reported" do
      assert %Error{type: "Bridge.Error.WireTest.Broken", message: message} = Wire.from_exception(%Broken{}, [])
      assert message =~ "broken"
    end
  end

  describe "a text" do
    test "of more than 16,384 characters is cut, and says how many follow" do
      for char <- ["x", "é", "✓", "😀"] do
        assert Wire.clip(String.duplicate(char, 16_384)) == String.duplicate(char, 16_384)

        assert Wire.clip(String.duplicate(char, 16_387)) ==
                 String.duplicate(char, 16_384) <> "… (3 more characters)"
      end
    end

    test "that is no UTF-8 is made of it" do
      assert Wire.clip("a\xFFb\xC3") == "a\\xffb\\xc3"
      assert Wire.to_wire(Error.new(:not_found, <<255>>))["message"] == "\\xff"
    end
  end

  test "Python reads what is written here, and writes it back the same" do
    long = String.duplicate("ü", 20_000)

    errors =
      for name <- Error.names(), message <- ["", "naïve ✓", long] do
        Error.new(name, message, remedy: "do\nthat", traceback: List.duplicate(frame("f.ex"), 70))
      end

    script = """
    import json, sys
    from bridge_kernel.contract.errors import ErrorObject, error_object, exception_from
    import msgspec
    for line in sys.stdin.buffer:
        error = exception_from(msgspec.json.decode(line, type=ErrorObject))
        sys.stdout.buffer.write(msgspec.json.encode(error_object(error)) + b"\\n")
    """

    dir = Path.join(System.tmp_dir!(), "bridge-errors-#{System.unique_integer([:positive])}")
    File.mkdir_p!(dir)
    on_exit(fn -> File.rm_rf!(dir) end)
    wire = Enum.map(errors, &Wire.to_wire/1)
    File.write!(Path.join(dir, "in"), Enum.map(wire, &[JSON.encode!(&1), ?\n]))
    command = ~s(exec "$0" -c "$1" < "$2")
    {out, 0} = System.cmd("sh", ["-c", command, TestKernels.python(), script, Path.join(dir, "in")])
    read = out |> String.split("\n", trim: true) |> Enum.map(&elem(JSON.decode(&1), 1))
    assert length(read) == length(wire)

    # A text that was cut is cut once more where Python clips it: its end says so again.
    for {sent, back} <- Enum.zip(wire, read), not String.contains?(sent["message"], "more characters") do
      assert back == sent
    end
  end

  defp caught(fun) do
    fun.()
    flunk("it raised nothing")
  rescue
    exception -> Wire.from_exception(exception, __STACKTRACE__)
  end

  defp inner, do: raise(ArgumentError, "bad")

  defp only_integers(n) when is_integer(n), do: n

  defp object(data, code \\ -32000), do: %{"code" => code, "message" => "m", "data" => data}
  defp frame(file), do: %{file: file, line: 1, function: "f", code: "c"}
  defp snake(name), do: name |> Macro.underscore() |> String.to_existing_atom()

  test "an exit says which call failed, and not with which arguments" do
    secret = "sk-planted"
    server = spawn(fn -> receive(do: (:end -> :ok)) end)

    for fun <- [fn -> GenServer.call(server, {:put, secret}, 1) end, fn -> GenServer.call(:nobody_here, secret) end] do
      error =
        try do
          fun.()
        catch
          kind, reason -> Wire.from_caught(kind, reason, __STACKTRACE__)
        end

      assert error.message =~ "GenServer.call/3"
      refute inspect(error) =~ secret
    end

    crash = {:function_clause, [{String, :upcase, [secret, :none], []}]}
    error = Wire.from_caught(:exit, crash, [])
    assert error.message =~ "String.upcase/2"
    refute inspect(error) =~ secret
    refute inspect(Wire.from_caught(:exit, {crash, {GenServer, :call, [server, secret, 5]}}, [])) =~ secret
    send(server, :end)
  end
end
