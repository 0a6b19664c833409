defmodule Bridge.Tools.Registered do
  @moduledoc """
  A tool as a session has it: the function, and what is known of its arguments.

  `schema` is the JSON Schema that kernels are told, `args` the arguments' names in order.
  """

  alias Bridge.{Error, Schema}

  @max_description 16_384

  @enforce_keys [:session, :name, :fun, :arity, :takes]
  defstruct [
    :session,
    :name,
    :fun,
    :arity,
    :takes,
    :timeout,
    args: [],
    required: [],
    schema: %{"type" => "object"},
    checked: false,
    closed: false,
    description: "",
    idempotent: false
  ]

  @typedoc """
  `takes` says how the function has its arguments: `:names` in the order of `args`, `:map` as one map, `:places` as they
  were given. `closed`: there are no arguments but `args`; `checked`: the schema is the user's, and says more than names.
  """
  @type t :: %__MODULE__{
          session: String.t(),
          name: String.t(),
          fun: fun(),
          arity: non_neg_integer(),
          takes: :names | :map | :places,
          args: [String.t()],
          required: [String.t()],
          schema: map(),
          checked: boolean(),
          closed: boolean(),
          description: String.t(),
          idempotent: boolean(),
          timeout: pos_integer() | nil
        }

  @options [:schema, :args, :description, :idempotent, :timeout, :bridge]

  @doc false
  @spec new(String.t(), String.t(), fun(), keyword()) :: {:ok, t()} | {:error, Error.t()}
  def new(session, name, fun, opts) do
    {:arity, arity} = Function.info(fun, :arity)
    tool = %__MODULE__{session: session, name: name, fun: fun, arity: arity, takes: :map}

    with :ok <- known(name, opts),
         {:ok, schema} <- schema(name, opts[:schema]),
         {:ok, args} <- names(name, opts[:args]),
         {:ok, tool} <- shape(tool, schema, args),
         {:ok, description} <- description(name, opts[:description]),
         {:ok, timeout} <- timeout(name, opts[:timeout]) do
      idempotent = Keyword.get(opts, :idempotent, false) == true
      {:ok, %{tool | description: description, idempotent: idempotent, timeout: timeout}}
    end
  end

  defp known(name, opts) do
    case Keyword.keys(opts) -- @options do
      [] -> :ok
      more -> refused(name, "there are no options #{inspect(more)}", "Options are #{inspect(@options)}.")
    end
  end

  defp shape(%{arity: 0} = tool, schema, args) when args in [nil, []] do
    named(tool, :names, schema, [])
  end

  defp shape(%{arity: 1} = tool, schema, nil), do: {:ok, in_a_map(tool, schema)}

  defp shape(%{arity: arity} = tool, nil, nil), do: {:ok, %{tool | takes: :places, schema: open(arity)}}

  defp shape(%{arity: arity} = tool, schema, nil) do
    case Map.get(schema, "required", []) do
      required when length(required) == arity ->
        named(tool, :names, schema, required)

      _other ->
        refused(
          tool.name,
          "its function takes #{arity} arguments, and nobody says in which order",
          "Say it: args: [:a, :b]."
        )
    end
  end

  defp shape(%{arity: arity} = tool, schema, args) do
    cond do
      length(args) == arity ->
        named(tool, :names, schema, args)

      arity == 1 ->
        named(tool, :map, schema, args)

      true ->
        refused(tool.name, "args: names #{length(args)} arguments, its function takes #{arity}", "Name each of them.")
    end
  end

  defp named(tool, takes, nil, args) do
    properties = Map.new(args, &{&1, %{}})

    schema = %{
      "type" => "object",
      "properties" => properties,
      "required" => args,
      "additionalProperties" => false
    }

    {:ok, %{tool | takes: takes, args: args, required: args, schema: schema, closed: true}}
  end

  defp named(tool, takes, schema, args) do
    case Map.keys(properties(schema)) -- args do
      [] ->
        required = Map.get(schema, "required", [])
        {:ok, %{tool | takes: takes, args: args, required: required, schema: schema, checked: true, closed: true}}

      more ->
        said = "the schema has #{Enum.join(more, ", ")}, its function takes (#{Enum.join(args, ", ")})"
        refused(tool.name, said, "Name all of them in args:, in the order of the function.")
    end
  end

  defp in_a_map(tool, nil), do: tool

  defp in_a_map(tool, schema) do
    required = Map.get(schema, "required", [])
    # Objects have no order: what is required first, in the order in which that is said.
    args = Enum.uniq(Enum.filter(required, &is_map_key(properties(schema), &1)) ++ Map.keys(properties(schema)))
    %{tool | args: args, required: required, schema: schema, checked: true}
  end

  defp open(0), do: %{"type" => "object", "properties" => %{}, "additionalProperties" => false}
  defp open(_arity), do: %{"type" => "object"}

  defp properties(schema), do: Map.get(schema, "properties", %{})

  # -- options ---------------------------------------------------------------------------------

  defp schema(_name, nil), do: {:ok, nil}

  defp schema(name, schema) when is_map(schema) and not is_struct(schema) do
    schema = schema |> stringed() |> Map.put_new("type", "object")

    with :ok <- of_arguments(schema),
         :ok <- Schema.check(schema) do
      {:ok, schema}
    else
      {:error, said} -> refused(name, "its schema is wrong: #{said}", "See https://json-schema.org.")
    end
  end

  defp schema(name, other) do
    refused(
      name,
      "schema: is a map, not #{inspect(other, limit: 5)}",
      "E.g. %{properties: %{x: %{type: \"integer\"}}}."
    )
  end

  defp of_arguments(%{"type" => "object"} = schema) do
    required = Map.get(schema, "required", [])
    properties = Map.get(schema, "properties", %{})

    cond do
      not is_map(properties) -> {:error, "properties is an object"}
      not (is_list(required) and Enum.all?(required, &is_binary/1)) -> {:error, "required is a list of names"}
      true -> :ok
    end
  end

  defp of_arguments(_schema), do: {:error, "arguments are of type \"object\": each has a name, in properties"}

  defp stringed(nil), do: nil
  defp stringed(flag) when is_boolean(flag), do: flag
  defp stringed(atom) when is_atom(atom), do: Atom.to_string(atom)
  defp stringed(list) when is_list(list), do: Enum.map(list, &stringed/1)

  defp stringed(%{} = map) when not is_struct(map) do
    Map.new(map, fn {key, value} -> {if(is_atom(key), do: Atom.to_string(key), else: key), stringed(value)} end)
  end

  defp stringed(other), do: other

  defp names(_name, nil), do: {:ok, nil}

  defp names(name, args) when is_list(args) do
    names = for arg <- args, is_binary(arg) or (is_atom(arg) and arg not in [nil, true, false]), do: to_string(arg)

    if length(names) == length(args) and Enum.uniq(names) == names,
      do: {:ok, names},
      else: refused(name, "args: is a list of different names, not #{inspect(args, limit: 10)}", "E.g. [:a, :b].")
  end

  defp names(name, other),
    do: refused(name, "args: is a list of names, not #{inspect(other, limit: 5)}", "E.g. [:a, :b].")

  defp description(_name, nil), do: {:ok, ""}

  defp description(name, text) when is_binary(text) do
    if String.valid?(text) and byte_size(text) <= @max_description,
      do: {:ok, text},
      else: refused(name, "its description is longer than #{@max_description} bytes, or no text", "Shorten it.")
  end

  defp description(name, other), do: refused(name, "description: is a text, not #{inspect(other, limit: 5)}", "")

  defp timeout(_name, nil), do: {:ok, nil}
  defp timeout(_name, ms) when is_integer(ms) and ms > 0, do: {:ok, ms}
  defp timeout(name, other), do: refused(name, "timeout: is in milliseconds, not #{inspect(other, limit: 5)}", "")

  defp refused(name, said, remedy) do
    Error.error(:invalid_arguments, "tool #{inspect(name)}: #{said}", remedy: remedy)
  end

  # -- how it is told ----------------------------------------------------------------------------

  @doc false
  @spec signature(t()) :: String.t()
  def signature(%{takes: :places, arity: arity}), do: "(#{Enum.map_join(1..arity, ", ", &"arg#{&1}")})"
  def signature(%{takes: :map, args: []}), do: "a map of any arguments"

  def signature(tool) do
    said = for name <- tool.args, do: if(name in tool.required, do: name, else: "#{name}?")
    "(#{Enum.join(said, ", ")})"
  end

  @doc false
  @spec shapes([term()]) :: String.t()
  # Types and keys only: the message goes to logs, and values may be secret.
  def shapes(args), do: "(#{Enum.map_join(args, ", ", &shape_of/1)})"

  defp shape_of(%{__struct__: module}), do: "%#{inspect(module)}{}"

  defp shape_of(%{} = map) do
    keys = map |> Map.keys() |> Enum.take(8) |> Enum.map_join(", ", &"#{inspect(&1, printable_limit: 40)} => …")
    "%{#{keys}#{if map_size(map) > 8, do: ", …"}}"
  end

  defp shape_of(text) when is_binary(text), do: "a text"
  defp shape_of(list) when is_list(list), do: "a list of #{length(list)}"
  defp shape_of(number) when is_integer(number), do: "an integer"
  defp shape_of(number) when is_float(number), do: "a float"
  defp shape_of(atom) when atom in [nil, true, false], do: inspect(atom)
  defp shape_of(tuple) when is_tuple(tuple), do: "a tuple of #{tuple_size(tuple)}"
  defp shape_of(_other), do: "something else"

  defimpl Inspect do
    import Inspect.Algebra

    def inspect(tool, _opts) do
      first = tool.description |> String.split("\n", parts: 2) |> hd()
      about = if first == "", do: "", else: ": " <> first
      concat(["#Bridge.Tool<", tool.name, " ", Bridge.Tools.Registered.signature(tool), about, ">"])
    end
  end
end
