defmodule Bridge.GenTest do
  @moduledoc "What `Bridge.Gen` writes, from what a kernel said of real classes (test/gen), and of classes that mean harm."
  # Not async: modules that are compiled while ExUnit still loads others have no documentation, and stderr is shared.
  use ExUnit.Case, async: false

  alias Bridge.{Gen, Inspected}

  doctest Bridge.Gen

  @recorded Path.expand("gen", __DIR__)
  @subjects [
    {"dspy.Predict", "Dspy.Predict"},
    {"collections.Counter", "Py.Counter"},
    {"datetime.date", "Py.Date"},
    {"pathlib.PurePath", "Py.PurePath"},
    {"math", "Py.Math"}
  ]

  defp recorded(path) do
    {:ok, inspected} = @recorded |> Path.join(path <> ".json") |> File.read!() |> Bridge.JSON.decode()
    Inspected.new(inspected)
  end

  # What Bridge's functions are called with, in place of calling them.
  defmodule Seen do
    def create_instance(class, args, opts), do: {:create_instance, class, args, opts}
    def call_method(ref, method, args, opts), do: {:call_method, ref, method, args, opts}
    def call(session, function, args, opts), do: {:call, session, function, args, opts}
  end

  # Compiled as a user's project would: a warning is an error.
  defp compile(source, name) do
    unique = "#{name}#{System.unique_integer([:positive])}"

    source =
      String.replace(source, "defmodule #{name} do", "defmodule Bridge.GenTest.#{unique} do\nalias Bridge.GenTest.Seen")

    source = String.replace(source, ~r/\bBridge\.(create_instance|call_method|call)\(/, "Seen.\\1(")
    source = String.replace(source, ~r/\balias Bridge\.GenTest\.Seen\b(?!.*Seen\.)/s, "")
    parent = self()

    warnings =
      ExUnit.CaptureIO.capture_io(:stderr, fn ->
        send(parent, {:compiled, Code.compile_string(source)})
      end)

    assert_received {:compiled, [{module, binary} | _]}
    assert warnings == ""
    {module, binary}
  end

  defp docs(binary) do
    {:ok, {_, [{_, chunk}]}} = :beam_lib.chunks(binary, [String.to_charlist("Docs")])
    {:docs_v1, _, :elixir, _, %{"en" => moduledoc}, _, functions} = :erlang.binary_to_term(chunk)
    {moduledoc, for({{:function, name, arity}, _, _, %{"en" => text}, _} <- functions, do: {{name, arity}, text})}
  end

  for {path, name} <- @subjects do
    test "#{path}: what is written compiles without a warning and is formatted" do
      {:ok, source} = Gen.source(recorded(unquote(path)), unquote(name))
      assert source == IO.iodata_to_binary([Code.format_string!(source), "\n"])
      {module, binary} = compile(source, unquote(name))
      assert {:module, ^module} = Code.ensure_loaded(module)

      {moduledoc, functions} = docs(binary)
      assert moduledoc =~ unquote(path)

      exported =
        for {function, _} <- module.module_info(:exports), function not in [:module_info, :__info__], do: function

      assert Enum.sort(Enum.uniq(exported)) ==
               functions |> Enum.map(fn {{name, _}, _} -> name end) |> Enum.uniq() |> Enum.sort()

      {:ok, specs} = Code.Typespec.fetch_specs(binary)
      assert length(specs) == length(functions), "each function has a spec"
    end
  end

  test "a constructor and a method call Bridge with the class, the method and the arguments in Python's order" do
    {:ok, source} = Gen.source(recorded("collections.Counter"), "Py.Counter")
    {counter, _} = compile(source, "Py.Counter")
    assert counter.create(["banana"]) == {:create_instance, "collections.Counter", ["banana"], []}

    assert counter.create(%{a: 1}, session: "s") ==
             {:create_instance, "collections.Counter", %{a: 1}, [session: "s"]}

    assert counter.most_common(:ref, n: 2) == {:call_method, :ref, "most_common", [n: 2], []}
    assert counter.most_common(:ref, [2]) == {:call_method, :ref, "most_common", [2], []}
    assert counter.setdefault(:ref, "x", [5]) == {:call_method, :ref, "setdefault", ["x", 5], []}
    assert counter.total(:ref, deadline: 5_000) == {:call_method, :ref, "total", [], [deadline: 5_000]}
    assert counter.fromkeys(:ref, ["a"], v: 1) == {:call_method, :ref, "fromkeys", [["a"]], [kwargs: [v: 1]]}
  end

  test "a function of a module is called by its full name in a session" do
    {:ok, source} = Gen.source(recorded("math"), "Py.Math")
    {math, _} = compile(source, "Py.Math")
    assert math.copysign("s", 1, -2) == {:call, "s", "math.copysign", [1, -2], []}
    assert math.hypot("s", [3, 4]) == {:call, "s", "math.hypot", [3, 4], []}

    assert math.isclose("s", 1, 2, [rel_tol: 0.5], deadline: 9) ==
             {:call, "s", "math.isclose", [1, 2], [kwargs: [rel_tol: 0.5], deadline: 9]}
  end

  test "attributes and properties are read" do
    {:ok, source} = Gen.source(recorded("datetime.date"), "Py.Date")
    {date, _} = compile(source, "Py.Date")
    assert date.year(:ref) == {:call_method, :ref, "year", [], []}
    {:ok, source} = Gen.source(recorded("pathlib.PurePath"), "Py.Path")
    {path, _} = compile(source, "Py.Path")
    assert path.suffix(:ref, deadline: 9) == {:call_method, :ref, "suffix", [], [deadline: 9]}
    assert path.joinpath(:ref, ["a", "b"]) == {:call_method, :ref, "joinpath", ["a", "b"], []}
  end

  test "what Python says of types and defaults is in specs and documentation" do
    {:ok, source} = Gen.source(recorded("dspy.Predict"), "Dspy.Predict")

    assert source =~
             ~s|def call(ref, args \\\\ [], opts \\\\ []) do\n    Bridge.call_method(ref, "__call__", args, opts)|

    assert source =~ ~s|def load_state(ref, state, kwargs \\\\ [], opts \\\\ [])|
    assert source =~ ~s|@spec load_state(t(), map(), [{:allow_unsafe_lm_state, boolean()}], keyword())|
    assert source =~ "  * `:num_threads`: `int | None`, by default `None`"
    assert source =~ "{:num_threads, integer() | nil}"
    refute source =~ "unquote"
  end

  test "names that Elixir cannot have, or has already, become others, and none is lost" do
    names = ~w(create end def if __call__ call Call toDict to_dict 2nd héllo 名 module_info max self ___ a-b)
    members = for name <- names, do: %{"name" => name, "kind" => "method", "signature" => "(self)", "parameters" => []}
    inspected = %{"name" => "m.C", "kind" => "class", "signature" => "()", "parameters" => [], "members" => members}
    {:ok, source} = Gen.source(Inspected.new(inspected), "C")
    {module, _} = compile(source, "C")

    called =
      for {function, 1} <- module.module_info(:exports), function not in [:create, :module_info, :__info__] do
        {:call_method, :ref, python, [], []} = apply(module, function, [:ref])
        python
      end

    assert Enum.sort(called) == Enum.sort(names)
    assert {:call_method, :ref, "end", [], []} = module.end_(:ref)
    assert {:call_method, :ref, "call", [], []} = module.call_2(:ref)
  end

  test "parameters that would clash with Bridge's own, or with each other, get other names" do
    parameters =
      for name <- ~w(self ref opts args kwargs end Ref) do
        %{"name" => name, "kind" => "positional_or_keyword", "annotation" => "", "default" => nil}
      end

    method = %{"name" => "m", "kind" => "method", "signature" => "(…)", "parameters" => parameters}
    inspected = %{"name" => "m.C", "kind" => "class", "signature" => "()", "parameters" => [], "members" => [method]}
    {:ok, source} = Gen.source(Inspected.new(inspected), "C")
    assert source =~ "def m(ref, ref_2, opts_2, args_2, kwargs_2, end_, ref_3, opts \\\\ [])"
    {module, _} = compile(source, "C")
    assert module.m(:r, 1, 2, 3, 4, 5, 6) == {:call_method, :r, "m", [1, 2, 3, 4, 5, 6], []}
  end

  describe "nothing that Python says gets out of its string:" do
    # Run when it is compiled, if it got out: then the test process has the message.
    @breakouts [
      ~S|""" <> send(:gen_test, :escaped) <> """|,
      "\"\"\"\nsend(:gen_test, :escaped)\n\"\"\"",
      ~S|#{send(:gen_test, :escaped)}|,
      ~S|\#{send(:gen_test, :escaped)}|,
      ~S|\\#{send(:gen_test, :escaped)}|,
      ~S|"); send(:gen_test, :escaped); ("|,
      "\\",
      String.duplicate("\"", 6),
      "end\nsend(:gen_test, :escaped)\ndefmodule X do",
      "\u202Ereversed\u2066 \u2028line\u2029 \u0085 \uFEFF \u0000 \e[31m \r",
      String.duplicate("long ", 2_000),
      "`" <> String.duplicate("\\\"", 9)
    ]

    for {text, n} <- Enum.with_index(@breakouts) do
      test "text #{n}" do
        Process.register(self(), :gen_test)
        text = unquote(text)
        parameter = &%{"name" => text, "kind" => &1, "annotation" => text, "default" => &2}

        member = %{
          "name" => text,
          "kind" => "method",
          "summary" => text,
          "signature" => "(self, #{text}) -> #{text}",
          "parameters" => [
            parameter.("positional_only", nil),
            parameter.("keyword_only", text),
            parameter.("var_keyword", nil)
          ]
        }

        inspected = %{
          "name" => text,
          "doc" => "before\n\n#{text}\n\nafter",
          "signature" => "(#{text})",
          "parameters" => member["parameters"],
          "members" => [member, %{member | "kind" => "property"}, %{member | "kind" => "function"}]
        }

        for kind <- ~w(class module function) do
          {:ok, source} = Gen.source(Inspected.new(Map.put(inspected, "kind", kind)), "Harm")
          {_, binary} = compile(source, "Harm")
          {moduledoc, _} = docs(binary)
          plain = text |> String.replace("\r", "") |> String.split("\n") |> Enum.map_join("\n", &String.trim_trailing/1)

          assert moduledoc =~ "before\n\n#{plain}\n\nafter" or
                   moduledoc =~ "before\n\n#{String.trim_trailing(plain)}\n\nafter"
        end

        refute_received :escaped
      end
    end
  end

  test "a module's name is a module's name, and what is no class, module or function is refused" do
    for name <- ["dspy", "A b", "A.b", "A\n", "", "A; IO.puts(1)", ":a", String.duplicate("A", 300)] do
      assert {:error, %Bridge.Error{name: :invalid_arguments}} = Gen.source(recorded("math"), name)
    end

    for inspected <- [%{}, %{"name" => "sys.path", "kind" => "value"}, %{"name" => 1, "kind" => "class"}] do
      assert {:error, %Bridge.Error{name: :invalid_arguments, remedy: remedy}} =
               Gen.source(Inspected.new(inspected), "A")

      assert remedy =~ "mix bridge.gen"
    end
  end

  test "types: what is known of Python's, and term() for the rest" do
    for {annotation, type} <- [
          {"str", "String.t()"},
          {"int | None", "integer() | nil"},
          {"typing.Optional[float]", "number() | nil"},
          {"Union[str, list[int]]", "String.t() | [integer()]"},
          {"dict[str, int]", "map()"},
          {"'Sequence[str] | None'", "[String.t()] | nil"},
          {"str | Callable[[int], str]", "term()"},
          {"list[foo.Bar]", "[term()]"},
          {String.duplicate("list[", 50) <> String.duplicate("]", 50), "[[[[[[[[term()]]]]]]]]"},
          {"x], do: System.halt() #", "term()"},
          {nil, "term()"}
        ] do
      assert Bridge.Gen.Types.of(annotation) == type
    end
  end
end
