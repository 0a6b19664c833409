defmodule Bridge.Store.Types do
  @moduledoc false
  # What a variable may hold: JSON Schema, or a kind that JSON Schema cannot say (`Bridge.Store.Kinds`). A value is
  # compared with its type, never converted. The schema is what is kept, and what an export has.

  alias Bridge.{Error, Schema}
  alias Bridge.Store.{Kinds, Plain}

  @kind "x-bridge"
  # A default that JSON cannot carry, as an export writes a value: type, json, buffers in base64.
  @default "x-bridge-default"
  @remarks ["$schema", "$id", "$comment", "title", "description", "default", "examples", @default]
  @max_bytes 65_536
  @named %{
    "any" => %{},
    "float" => %{"type" => "number"},
    "integer" => %{"type" => "integer"},
    "string" => %{"type" => "string"},
    "boolean" => %{"type" => "boolean"},
    "list" => %{"type" => "array"},
    "map" => %{"type" => "object"},
    "dict" => %{"type" => "object"}
  }
  @number %{
    "ge" => "minimum",
    "gt" => "exclusiveMinimum",
    "le" => "maximum",
    "lt" => "exclusiveMaximum",
    "multiple_of" => "multipleOf"
  }
  @keywords %{
    "number" => @number,
    "integer" => @number,
    "string" => %{"min_length" => "minLength", "max_length" => "maxLength", "pattern" => "pattern"},
    "array" => %{"min_length" => "minItems", "max_length" => "maxItems"},
    "object" => %{"min_length" => "minProperties", "max_length" => "maxProperties"}
  }

  @doc "The schema of a type by its name and constraints, or of a JSON Schema and constraints."
  @spec make(atom() | String.t() | map(), keyword()) :: {:ok, map()} | {:error, Error.t()}
  def make(type, constraints) do
    constraints = for {name, value} <- constraints, do: {to_string(name), value}
    {remarks, own} = Enum.split_with(constraints, fn {name, _value} -> name in ["default", "description"] end)

    with {:ok, schema} <- base(type, own),
         {:ok, schema} <- described(schema, remarks),
         {:ok, schema} <- with_default(schema, remarks),
         {:ok, schema} <- of_schema(schema),
         :ok <- choices_fit(schema, own) do
      {:ok, schema}
    end
  end

  defp base(%{} = schema, own), do: constrained(Plain.stringify(schema), "this schema", own)
  defp base(type, own) when is_atom(type), do: base(Atom.to_string(type), own)

  defp base("choice", own) do
    case own do
      [{"choices", [_ | _] = choices}] -> {:ok, %{"enum" => choices}}
      _other -> wrong("a choice takes choices: what may be chosen")
    end
  end

  defp base(type, own) when is_binary(type) do
    cond do
      type in Kinds.names() -> with {:error, reason} <- Kinds.named(type, own), do: wrong(reason)
      is_map_key(@named, type) -> constrained(@named[type], type, own)
      true -> unknown(type)
    end
  end

  defp base(type, _own), do: unknown(type)

  defp unknown(type) do
    names = Enum.join(Enum.sort(["choice" | Map.keys(@named) ++ Kinds.names()]), ", ")
    wrong("there is no type #{inspect(type, printable_limit: 60)}: there are #{names}, and JSON Schemas")
  end

  defp constrained(schema, name, own) do
    types = if is_map_key(schema, @kind), do: [], else: json_types(schema, schema, 16)
    fitting = for type <- types, {name, keyword} <- Map.get(@keywords, type, %{}), do: {name, keyword}

    Enum.reduce_while(own, {:ok, %{}}, fn {constraint, value}, {:ok, keywords} ->
      case {constraint, for({^constraint, keyword} <- fitting, do: keyword)} do
        {"enum", _} when not is_map_key(schema, @kind) ->
          {:cont, {:ok, Map.put(keywords, "enum", value)}}

        {_, []} ->
          takes = fitting |> Enum.map(&elem(&1, 0)) |> Enum.concat(~w(default description enum)) |> Enum.uniq()
          {:halt, wrong("#{constraint} does not fit #{name}, which takes #{Enum.join(takes, ", ")}")}

        {_, found} ->
          {:cont, {:ok, Enum.reduce(found, keywords, &Map.put(&2, &1, value))}}
      end
    end)
    |> case do
      {:ok, keywords} -> {:ok, both(schema, keywords)}
      {:error, error} -> {:error, error}
    end
  end

  # Where a schema and a constraint say the same of a value, both hold.
  defp both(schema, keywords) do
    if Enum.any?(keywords, fn {keyword, _value} -> is_map_key(schema, keyword) end) do
      {around, inner} = Map.split(schema, ["$defs" | @remarks])
      around |> Map.put("allOf", [inner]) |> Map.merge(keywords)
    else
      Map.merge(schema, keywords)
    end
  end

  # The JSON types that a schema speaks of, as far as it says.
  defp json_types(%{"type" => type}, _root, _depth) when is_binary(type), do: [type]
  defp json_types(%{"type" => types}, _root, _depth) when is_list(types), do: Enum.filter(types, &is_binary/1)

  defp json_types(%{} = schema, root, depth) when depth > 0 do
    parts = for keyword <- ~w(anyOf oneOf allOf), parts = schema[keyword], is_list(parts), part <- parts, do: part
    enum = for value <- List.wrap(schema["enum"]), do: %{"type" => json_type(value)}
    Enum.uniq(Enum.flat_map(parts ++ enum ++ referred(schema, root), &json_types(&1, root, depth - 1)))
  end

  defp json_types(_schema, _root, _depth), do: []

  defp referred(%{"$ref" => "#/$defs/" <> name}, %{"$defs" => %{} = defs}), do: List.wrap(defs[name])
  defp referred(_schema, _root), do: []

  defp json_type(value) when is_binary(value), do: "string"
  defp json_type(value) when is_integer(value), do: "integer"
  defp json_type(value) when is_float(value), do: "number"
  defp json_type(value) when is_list(value), do: "array"
  defp json_type(value) when is_boolean(value) or is_nil(value), do: "null"
  defp json_type(_value), do: "object"

  defp described(schema, remarks) do
    case List.keyfind(remarks, "description", 0) do
      nil -> {:ok, schema}
      {_, text} when is_binary(text) -> {:ok, Map.put(schema, "description", text)}
      {_, other} -> wrong("a description is text, not #{inspect(other, limit: 5, printable_limit: 60)}")
    end
  end

  defp with_default(schema, remarks) do
    case List.keyfind(remarks, "default", 0) do
      nil ->
        {:ok, schema}

      {_, value} ->
        with {:ok, json, buffers} <- Bridge.Value.encode(value, "default") do
          if buffers == [] and not tagged?(json) do
            {:ok, Map.put(schema, "default", json)}
          else
            written = %{
              "type" => Plain.type_name(value),
              "json" => json,
              "buffers" => Enum.map(buffers, &Base.encode64/1)
            }

            {:ok, Map.put(schema, @default, written)}
          end
        end
    end
  end

  defp tagged?(%{"$bridge" => _}), do: true
  defp tagged?(%{} = map), do: Enum.any?(map, fn {_key, value} -> tagged?(value) end)
  defp tagged?(list) when is_list(list), do: Enum.any?(list, &tagged?/1)
  defp tagged?(_json), do: false

  # One that its own type refuses could never be chosen.
  defp choices_fit(schema, own) do
    choices = with {_, choices} <- List.keyfind(own, "enum", 0, {nil, []}), do: choices
    wrong? = fn choice -> match?({:error, _}, check(schema, "enum", choice)) end

    case Enum.find(choices, wrong?) do
      nil ->
        :ok

      choice ->
        wrong("enum: #{inspect(choice, limit: 5, printable_limit: 60)} does not fit, so it could never be chosen")
    end
  end

  @doc "The type that is written so, by this host or another."
  @spec of_schema(term()) :: {:ok, map()} | {:error, Error.t()}
  def of_schema(schema) when is_map(schema) do
    with {:ok, size} <- json_size(schema),
         :ok <-
           if(size > @max_bytes, do: wrong("a type is written in at most #{@max_bytes} bytes, not #{size}"), else: :ok),
         :ok <- sound(schema),
         {:ok, default} <- default(schema),
         :ok <- with({:ok, value} <- default, do: check(schema, "default", value), else: (:none -> :ok)) do
      {:ok, schema}
    end
  end

  def of_schema(_schema), do: wrong("a type is written as an object")

  defp json_size(schema) do
    {:ok, schema |> Bridge.JSON.encode!() |> IO.iodata_length()}
  rescue
    error in ArgumentError -> wrong("a type is written as JSON: #{Exception.message(error)}")
  end

  defp sound(%{@kind => _} = schema), do: with({:error, reason} <- Kinds.check(schema, @remarks), do: wrong(reason))

  # A remark may be what JSON Schema would read otherwise.
  defp sound(schema) do
    with {:error, reason} <- schema |> Map.delete(@default) |> Schema.check(),
         do: wrong("this is no JSON Schema: #{reason}")
  end

  @doc "What a variable of the type holds before it is written."
  @spec default(map()) :: {:ok, {:ok, term()} | :none} | {:error, Error.t()}
  def default(%{@default => written}) do
    with %{"type" => type, "json" => json, "buffers" => buffers} when is_binary(type) and is_list(buffers) <- written,
         {:ok, buffers} <- decoded(buffers),
         {:ok, value} <- Bridge.Value.decode(json, buffers, path: "default") do
      {:ok, {:ok, value}}
    else
      {:error, %Error{} = error} -> wrong(error.message)
      _other -> wrong("#{@default} is no value")
    end
  end

  def default(%{"default" => json}) do
    with {:ok, value} <- Bridge.Value.decode(json, [], path: "default"), do: {:ok, {:ok, value}}
  end

  def default(_schema), do: {:ok, :none}

  defp decoded(buffers) do
    Enum.reduce_while(Enum.reverse(buffers), {:ok, []}, fn text, {:ok, done} ->
      case is_binary(text) && Base.decode64(text) do
        {:ok, bytes} -> {:cont, {:ok, [bytes | done]}}
        _no -> {:halt, :error}
      end
    end)
  end

  @doc "`:invalid_value` unless the value fits; the message begins with the variable's name."
  @spec check(map() | nil, String.t(), term()) :: :ok | {:error, Error.t()}
  def check(nil, _name, _value), do: :ok

  def check(%{@kind => _} = schema, name, value) do
    case Kinds.problem(schema, value, Plain.type_name(value)) do
      nil -> :ok
      problem -> invalid(schema, name, problem)
    end
  end

  def check(schema, name, value) do
    # Anything, be it JSON or not.
    if Enum.all?(Map.keys(schema), &(&1 in @remarks)) do
      :ok
    else
      case Schema.validate(schema, value) do
        :ok -> :ok
        {:error, [{path, reason} | _more]} -> invalid(schema, name, "#{path}: #{reason}")
      end
    end
  end

  defp invalid(schema, name, problem) do
    Error.error(:invalid_value, String.slice(name, 0, 60) <> problem, remedy: "Its type is #{shown(schema)}.")
  end

  defp shown(schema) do
    text = schema |> Map.drop(["$defs", "title", @default]) |> Bridge.JSON.canonical()
    if String.length(text) <= 200, do: text, else: String.slice(text, 0, 200) <> "…"
  end

  defp wrong(message), do: Error.error(:invalid_params, message, remedy: "See Bridge.SessionStore.set_type/4.")
end
