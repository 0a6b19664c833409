defmodule Bridge.Gen do
  @moduledoc """
  Writes the source of a wrapper module from what `object.inspect` says of a Python class, module or function. Pure:
  `mix bridge.gen` asks the kernel and writes the file.

  The source is plain functions that call `Bridge`, one a public method, to be read and changed like any other code. What
  comes from Python ends up in it as text only: names become identifiers of their own, and documentation cannot leave its
  string.

  Arguments that Python requires are parameters. Those that have a default are a keyword list, `kwargs`; Bridge's own
  options come after it, so that the two cannot be mixed up. Where none is required `args` takes them all, by place, by name
  or both; it is there too where Python takes any number of arguments, or does not say what it takes. Attributes and properties are functions that read them.
  """

  alias Bridge.{Error, Inspected}
  alias Bridge.Gen.{Names, Types}

  @max_doc 20_000
  @max_name 200
  @kinds ~w(class module function)

  @doc """
  The formatted source of the module called `name`, e.g. `"Dspy.Predict"`, for what was inspected.

  Fails with `:invalid_arguments` for a name that is none of a module's, and for what is no class, module or function.

      iex> inspected = %Bridge.Inspected{name: "math.hypot", kind: "function", doc: "The hypotenuse."}
      iex> {:ok, source} = Bridge.Gen.source(inspected, "Py.Hypot")
      iex> source =~ "def hypot(session, args \\\\\\\\ [], opts \\\\\\\\ [])"
      true
  """
  @spec source(Inspected.t(), String.t()) :: {:ok, String.t()} | {:error, Error.t()}
  def source(%Inspected{} = inspected, name) do
    inspected = said(inspected)

    with :ok <- check_name(name), {:ok, kind, path} <- subject(inspected) do
      functions = functions(kind, path, inspected)
      code = IO.iodata_to_binary(module(name, kind, path, inspected, functions))
      {:ok, IO.iodata_to_binary([Code.format_string!(code), "\n"])}
    end
  end

  @doc "What was inspected as members are: a map with strings for keys, as the protocol has it."
  @spec said(Inspected.t()) :: %{String.t() => term()}
  def said(%Inspected{} = inspected) do
    for {key, value} <- Map.from_struct(inspected), into: %{}, do: {Atom.to_string(key), value}
  end

  @doc "Whether it is the name of a module, as source has it: nothing else gets into the source unescaped."
  @spec check_name(String.t()) :: :ok | {:error, Error.t()}
  def check_name(name) do
    if is_binary(name) and byte_size(name) <= @max_name and name =~ ~r/\A[A-Z][A-Za-z0-9_]*(\.[A-Z][A-Za-z0-9_]*)*\z/ do
      :ok
    else
      Error.error(:invalid_arguments, "#{inspect(name)} is no module's name",
        remedy: "Name it like Dspy.Predict: words that begin with a capital letter, joined by dots."
      )
    end
  end

  defp subject(%{"kind" => kind, "name" => path}) when kind in @kinds and is_binary(path), do: {:ok, kind, path}

  defp subject(inspected) do
    Error.error(:invalid_arguments, "#{inspect(inspected["name"])} is no class, module or function",
      remedy: "Name a class, e.g. mix bridge.gen Dspy.Predict dspy.Predict."
    )
  end

  # -- what there is to write --------------------------------------------------

  defp functions("class", path, inspected) do
    constructor = %{inspected | "name" => "create"} |> Map.put("summary", "Makes an instance of `#{code(path)}`.")

    used =
      for %{"kind" => kind} = member when kind in ~w(method property attribute) <- members(inspected), do: bound(member)

    [{:create, "create", constructor} | Names.unique(used, ["create"], &{role(&2), &1, &2})]
  end

  defp functions("module", _path, inspected) do
    functions = for %{"kind" => "function"} = member <- members(inspected), do: member
    Names.unique(functions, [], &{:function, &1, &2})
  end

  defp functions("function", path, inspected) do
    function = %{inspected | "name" => last(path)} |> Map.put("summary", "Calls `#{code(path)}`.")
    Names.unique([function], [], &{:function, &1, &2})
  end

  defp role(%{"kind" => "method"}), do: :method
  defp role(_property), do: :attribute

  # A method's first parameter is the instance. The contract does not say which functions of a class are static, so it is
  # known by its name.
  defp bound(%{"parameters" => [%{"name" => name, "kind" => "positional" <> _} | parameters]} = member)
       when name in ~w(self cls type mcs _self __self),
       do: %{member | "parameters" => parameters}

  defp bound(member), do: member

  defp members(inspected), do: inspected["members"] || []

  defp last(path), do: path |> String.split(".") |> List.last()

  # -- the module ---------------------------------------------------------------

  defp module(name, kind, path, inspected, functions) do
    [
      "defmodule #{name} do\n@moduledoc \"\"\"\n",
      heredoc([
        opening(kind, path),
        described(inspected["doc"]),
        constants(kind, inspected),
        "Written by `mix bridge.gen #{name} #{code(path)}`, and yours to change."
      ]),
      "\"\"\"\n\n",
      constant(kind, path),
      types(kind),
      Enum.map(functions, &function(kind, path, &1)),
      "end\n"
    ]
  end

  defp opening("class", path),
    do: "The Python class `#{code(path)}`: its instances live in the host, and kernels call them."

  defp opening(kind, path), do: "The Python #{kind} `#{code(path)}`, called in a kernel."

  defp constants("module", inspected) do
    case for %{"kind" => "attribute", "name" => name} <- members(inspected), do: name do
      [] -> ""
      names -> "It also has " <> Enum.map_join(names, ", ", &"`#{code(&1)}`") <> ", which are no functions."
    end
  end

  defp constants(_kind, _inspected), do: ""

  defp constant("class", path), do: "@class #{literal(path)}\n\n"
  defp constant(_kind, _path), do: ""

  defp types("class") do
    """
    @typedoc "An instance: its recipe and its state are the session's."
    @type t :: Bridge.Ref.t()


    """
  end

  defp types(_kind), do: ""

  defp function(kind, path, {role, elixir, member}) do
    python = member["name"]
    {given, optional} = arguments(member, role)
    required = Enum.map(given, fn {name, _parameter} -> name end)
    open = role != :attribute and open?(member)
    named = role != :attribute and (optional != [] or free?(member))

    either = given == [] and (open or named)

    # {parameter, type}, in order
    parameters =
      Enum.concat([
        first(role),
        Enum.map(given, fn {name, parameter} -> {name, Types.of(parameter["annotation"])} end),
        if(either, do: [{"args \\\\ []", if(named, do: "Bridge.arguments()", else: "[term()]")}], else: []),
        if(open and not either, do: [{"args \\\\ []", "[term()]"}], else: []),
        if(named and not either, do: [{"kwargs \\\\ []", kwargs_type(optional, member)}], else: []),
        [{"opts \\\\ []", "keyword()"}]
      ])

    {head, spec} = Enum.unzip(parameters)
    with_names = if named and not either, do: "Keyword.put(opts, :kwargs, kwargs)", else: "opts"
    passed = "#{positional(required, open or either)}, #{with_names}"

    [
      "@doc \"\"\"\n",
      heredoc([
        member["summary"] || "",
        signature(role, path, python, member),
        positional_doc(open or either, either and named, member),
        keywords(optional, if(either, do: "args", else: "kwargs"))
      ]),
      "\"\"\"\n",
      "@spec #{elixir}(#{Enum.join(spec, ", ")}) :: {:ok, #{result_type(role, member)}} | {:error, Bridge.Error.t()}\n",
      "def #{elixir}(#{Enum.join(head, ", ")}) do\n",
      body(role, kind, path, python, passed),
      "\nend\n\n"
    ]
  end

  defp first(:create), do: []
  defp first(role) when role in [:method, :attribute], do: [{"ref", "t()"}]
  defp first(:function), do: [{"session", "String.t() | Bridge.Session.t()"}]

  defp positional([], true), do: "args"
  defp positional(required, true), do: "[#{Enum.join(required, ", ")} | args]"
  defp positional(required, false), do: "[#{Enum.join(required, ", ")}]"

  defp body(:create, _kind, _path, _python, passed), do: "Bridge.create_instance(@class, #{passed})"

  defp body(role, _kind, _path, python, passed) when role in [:method, :attribute],
    do: "Bridge.call_method(ref, #{literal(python)}, #{passed})"

  defp body(:function, kind, path, python, passed) do
    full = if kind == "module", do: path <> "." <> python, else: path
    "Bridge.call(session, #{literal(full)}, #{passed})"
  end

  # -- parameters ---------------------------------------------------------------

  # {required positional ones with the names they get, those that go by keyword}
  defp arguments(member, role) do
    parameters = member["parameters"] || []
    required = for %{"kind" => "positional" <> _, "default" => nil} = p <- parameters, do: p
    by_keyword = for %{"kind" => kind} = p <- parameters, keyword?(kind, p["default"]), do: p
    taken = ["args", "kwargs", "opts"] ++ Enum.map(first(role), fn {name, _type} -> name end)
    {Names.unique(required, taken, &{&1, &2}), by_keyword}
  end

  defp keyword?("keyword_only", _default), do: true
  defp keyword?("positional_or_keyword", default), do: default != nil
  defp keyword?(_kind, _default), do: false

  # Whether more positional arguments may be given than are required: Python says so, or says nothing.
  defp open?(%{"signature" => signature} = member) when signature not in ["", nil] do
    Enum.any?(member["parameters"] || [], fn
      %{"kind" => "var_positional"} -> true
      %{"kind" => "positional_only", "default" => default} -> default != nil
      _other -> false
    end)
  end

  defp open?(_member), do: true

  defp kwargs_type(optional, member) do
    if free?(member) do
      "keyword() | map()"
    else
      "[" <> Enum.map_join(optional, " | ", &"{#{key(&1["name"])}, #{Types.of(&1["annotation"])}}") <> "]"
    end
  end

  # Whether Python takes names that it does not list.
  defp free?(member) do
    unknown?(member) or Enum.any?(member["parameters"] || [], &(&1["kind"] == "var_keyword"))
  end

  defp unknown?(member), do: member["signature"] in ["", nil]

  # An atom in the source: of a parameter's name, quoted if it has to be. There is none of more than 255 characters.
  defp key(name) do
    cond do
      name =~ ~r/\A[a-z_][a-z0-9_]*\z/ and byte_size(name) <= 255 -> ":" <> name
      String.length(name) <= 255 -> ":" <> literal(name)
      true -> "atom()"
    end
  end

  # A string in the source. Not by `inspect`, which leaves characters as they are that the compiler refuses.
  defp literal(text), do: ~s(") <> (text |> escape(~s(")) |> String.replace("\n", "\\n")) <> ~s(")

  defp result_type(:create, _member), do: "t()"

  defp result_type(_role, member) do
    case Regex.run(~r/\) -> (.+)\z/su, member["signature"] || "") do
      [_, annotation] -> Types.of(annotation)
      nil -> "term()"
    end
  end

  # -- documentation ------------------------------------------------------------

  defp described(doc) when is_binary(doc) do
    if String.length(doc) > @max_doc, do: String.slice(doc, 0, @max_doc) <> " …", else: doc
  end

  defp described(nil), do: ""

  defp signature(:attribute, _path, python, member), do: "    " <> one_line(python) <> "  # #{member["kind"]}"

  defp signature(role, path, python, member) do
    shown = if role == :create, do: last(path), else: python
    "    " <> one_line(shown <> shown_parameters(member))
  end

  defp one_line(text), do: String.replace(text, ~r/\s+/u, " ")

  defp shown_parameters(member), do: if(unknown?(member), do: "(…)", else: member["signature"])

  defp positional_doc(false, _either, _member), do: ""

  defp positional_doc(true, either, member) do
    unsaid = if unknown?(member), do: "Python does not say what it takes. ", else: ""

    if either do
      unsaid <> "`args` are positional arguments in a list, named ones in a map, or `{list, map}`."
    else
      unsaid <> "`args` are further positional arguments."
    end
  end

  defp keywords([], _where), do: ""

  defp keywords(optional, where) do
    "Named arguments, in `#{where}`:\n\n" <>
      Enum.map_join(optional, "\n", fn %{"name" => name} = parameter ->
        annotation = if parameter["annotation"] in ["", nil], do: "", else: ": `#{code(parameter["annotation"])}`"
        "  * `:#{code(name)}`#{annotation}#{default(parameter["default"])}"
      end)
  end

  defp default(nil), do: ", required"
  defp default(text), do: ", by default `#{code(text)}`"

  # Text for between backticks.
  defp code(text), do: text |> String.replace("`", "'") |> String.replace(~r/\s+/u, " ")

  # Paragraphs as the inside of a heredoc, which they cannot end, interpolate into or make the compiler refuse.
  defp heredoc(paragraphs) do
    text =
      paragraphs
      |> Enum.map(&String.trim_trailing/1)
      |> Enum.reject(&(String.trim(&1) == ""))
      |> Enum.join("\n\n")
      |> String.replace(~r/\r\n?/, "\n")
      |> String.split("\n")
      |> Enum.map_join("\n", &String.trim_trailing/1)

    [escape(text, ~s(""")), "\n"]
  end

  # Text as the inside of a string that this delimiter would end. Of what is not ASCII only letters, marks, numbers,
  # punctuation and symbols stay: the compiler refuses characters that turn the direction of text, and some end lines.
  defp escape(text, delimiter) do
    text
    |> String.replace("\\", "\\\\")
    |> String.replace(delimiter, String.replace(delimiter, ~s("), ~S(\")))
    |> String.replace("\#{", ~S(\#) <> "{")
    |> String.replace(~r/[^\n\x20-\x7E\p{L}\p{M}\p{N}\p{P}\p{S}]/u, fn <<char::utf8>> ->
      "\\u{" <> Integer.to_string(char, 16) <> "}"
    end)
  end
end
