defmodule Bridge.Schema.Judge do
  # What does not fit about a JSON value. Bounded: 16 problems, and so many references followed as the value is long,
  # for they are what makes a small schema take exponential time.
  @moduledoc false

  alias Bridge.Schema.{Pattern, Pointer}
  alias Bridge.Value.{Fault, Text}

  @max_problems 16
  @free_references 2_000
  @scalars %{"number" => [:number], "integer" => [:integer], "string" => [:string], "boolean" => [:boolean]}

  defstruct [:root, references: 0, problems: [], count: 0]

  @spec judge(map() | boolean(), term()) :: :ok | {:error, [{String.t(), String.t()}]}
  def judge(schema, value) do
    state = %__MODULE__{root: schema, references: @free_references + 10 * :erlang.external_size(value)}

    case apply_schema(schema, value, [], state).problems do
      [] ->
        :ok

      problems ->
        {:error, problems |> Enum.reverse() |> Enum.map(fn {path, message} -> {shown_path(path), message} end)}
    end
  catch
    {__MODULE__, :references} -> {:error, [{"", "it takes too many references of the schema to check it"}]}
  end

  @doc "Whether a schema comes to an end with small values."
  @spec ends?(map() | boolean()) :: :ok | {:error, String.t()}
  def ends?(schema) do
    for probe <- [nil, false, 0, "", [], %{}] do
      apply_schema(schema, probe, [], %__MODULE__{root: schema, references: @free_references})
    end

    :ok
  catch
    {__MODULE__, :references} -> {:error, "this JSON Schema refers to itself without an end, or nearly so"}
  end

  defp shown_path(path), do: path |> Enum.reverse() |> Enum.take(20) |> Enum.map_join(&Fault.key_step/1)

  defp apply_schema(_schema, _value, _path, %{count: count} = state) when count >= @max_problems, do: state
  defp apply_schema(true, _value, _path, state), do: state
  defp apply_schema(false, _value, path, state), do: problem(state, path, "the schema allows nothing here")

  defp apply_schema(schema, value, path, state) do
    Enum.reduce(schema, state, fn {keyword, limit}, state -> keyword(keyword, limit, value, schema, path, state) end)
  end

  defp problem(%{count: count} = state, _path, _message) when count >= @max_problems, do: state

  defp problem(state, path, message),
    do: %{state | problems: [{path, message} | state.problems], count: state.count + 1}

  defp unless_fits(true, _path, state, _message), do: state
  defp unless_fits(false, path, state, message), do: problem(state, path, message.())

  # Whether it fits, and what is left of the references.
  defp fits(schema, value, state) do
    inner = apply_schema(schema, value, [], %{state | problems: [], count: 0})
    {inner.count == 0, %{state | references: inner.references}}
  end

  # -- keywords ------------------------------------------------------------------

  defp keyword("type", types, value, _schema, path, state) do
    types = List.wrap(types)

    unless_fits(Enum.any?(types, &type?(&1, value)), path, state, fn ->
      "#{shown(value)} is not of type #{Enum.join(types, " or ")}"
    end)
  end

  defp keyword("enum", allowed, value, _schema, path, state) do
    unless_fits(Enum.any?(allowed, &(&1 == value)), path, state, fn ->
      "#{shown(value)} is none of #{limit(allowed)}"
    end)
  end

  defp keyword("const", allowed, value, _schema, path, state) do
    unless_fits(allowed == value, path, state, fn -> "#{shown(value)} is not #{limit(allowed)}" end)
  end

  defp keyword("minimum", limit, value, _schema, path, state) when is_number(value) do
    unless_fits(value >= limit, path, state, fn -> "#{shown(value)} is less than #{limit(limit)}" end)
  end

  defp keyword("maximum", limit, value, _schema, path, state) when is_number(value) do
    unless_fits(value <= limit, path, state, fn -> "#{shown(value)} is more than #{limit(limit)}" end)
  end

  defp keyword("exclusiveMinimum", limit, value, _schema, path, state) when is_number(value) do
    unless_fits(value > limit, path, state, fn -> "#{shown(value)} is not more than #{limit(limit)}" end)
  end

  defp keyword("exclusiveMaximum", limit, value, _schema, path, state) when is_number(value) do
    unless_fits(value < limit, path, state, fn -> "#{shown(value)} is not less than #{limit(limit)}" end)
  end

  defp keyword("multipleOf", factor, value, _schema, path, state) when is_number(value) do
    fits = multiple?(value, factor)
    unless_fits(fits, path, state, fn -> "#{shown(value)} is not a multiple of #{limit(factor)}" end)
  end

  defp keyword("minLength", limit, value, _schema, path, state) when is_binary(value) do
    unless_fits(characters(value) >= limit, path, state, fn ->
      "#{shown(value)} is shorter than #{limit(limit)} characters"
    end)
  end

  defp keyword("maxLength", limit, value, _schema, path, state) when is_binary(value) do
    unless_fits(characters(value) <= limit, path, state, fn ->
      "#{shown(value)} is longer than #{limit(limit)} characters"
    end)
  end

  defp keyword("pattern", pattern, value, _schema, path, state) when is_binary(value) do
    case Pattern.match?(pattern, value) do
      true -> state
      false -> problem(state, path, "#{shown(value)} does not match the pattern #{limit(pattern)}")
      :unknown -> problem(state, path, "it takes too long to match #{shown(value)} with the pattern #{limit(pattern)}")
    end
  end

  defp keyword("minItems", limit, value, _schema, path, state) when is_list(value) do
    unless_fits(length(value) >= limit, path, state, fn -> "#{shown(value)} has fewer than #{limit(limit)}" end)
  end

  defp keyword("maxItems", limit, value, _schema, path, state) when is_list(value) do
    unless_fits(length(value) <= limit, path, state, fn -> "#{shown(value)} has more than #{limit(limit)}" end)
  end

  defp keyword("uniqueItems", true, value, _schema, path, state) when is_list(value) do
    unique = value |> MapSet.new(&identity/1) |> MapSet.size()
    unless_fits(unique == length(value), path, state, fn -> "#{shown(value)} holds the same twice" end)
  end

  defp keyword("prefixItems", schemas, value, _schema, path, state) when is_list(value) do
    [schemas, value]
    |> Enum.zip()
    |> Enum.with_index()
    |> Enum.reduce(state, fn {{schema, item}, index}, state -> apply_schema(schema, item, [index | path], state) end)
  end

  defp keyword("items", items, value, schema, path, state) when is_list(value) do
    first = length(Map.get(schema, "prefixItems", []))
    value = Enum.drop(value, first)
    # A long list of plain numbers or strings is looked at as a whole.
    if first == 0 and scalars?(items, value), do: state, else: items(value, first, items, path, state)
  end

  defp keyword("contains", wanted, value, schema, path, state) when is_list(value) do
    {count, state} =
      Enum.reduce(value, {0, state}, fn item, {count, state} ->
        {fits, state} = fits(wanted, item, state)
        {if(fits, do: count + 1, else: count), state}
      end)

    least = Map.get(schema, "minContains", 1)

    state =
      unless_fits(count >= least, path, state, fn -> "#{shown(value)} holds fewer than #{least} of what it must" end)

    most = Map.get(schema, "maxContains")

    unless_fits(most == nil or count <= most, path, state, fn ->
      "#{shown(value)} holds more than #{most} of what it may"
    end)
  end

  defp keyword("minProperties", limit, value, _schema, path, state) when is_map(value) do
    unless_fits(map_size(value) >= limit, path, state, fn -> "#{shown(value)} has fewer than #{limit(limit)}" end)
  end

  defp keyword("maxProperties", limit, value, _schema, path, state) when is_map(value) do
    unless_fits(map_size(value) <= limit, path, state, fn -> "#{shown(value)} has more than #{limit(limit)}" end)
  end

  defp keyword("required", names, value, _schema, path, state) when is_map(value),
    do: required(names, value, path, state)

  defp keyword("dependentRequired", names, value, _schema, path, state) when is_map(value) do
    for({name, needed} <- names, is_map_key(value, name), do: needed) |> Enum.concat() |> required(value, path, state)
  end

  defp keyword("dependentSchemas", schemas, value, _schema, path, state) when is_map(value) do
    for({name, schema} <- schemas, is_map_key(value, name), do: schema)
    |> Enum.reduce(state, &apply_schema(&1, value, path, &2))
  end

  defp keyword("properties", schemas, value, _schema, path, state) when is_map(value) do
    Enum.reduce(schemas, state, fn {name, schema}, state ->
      case value do
        %{^name => item} -> apply_schema(schema, item, [name | path], state)
        _ -> state
      end
    end)
  end

  defp keyword("patternProperties", schemas, value, _schema, path, state) when is_map(value) do
    for {pattern, schema} <- schemas, {name, item} <- value, reduce: state do
      state ->
        if Pattern.match?(pattern, name) == false, do: state, else: apply_schema(schema, item, [name | path], state)
    end
  end

  defp keyword("additionalProperties", additional, value, schema, path, state) when is_map(value) do
    patterns = schema |> Map.get("patternProperties", %{}) |> Map.keys()
    names = Map.keys(value) -- Map.keys(Map.get(schema, "properties", %{}))
    names = Enum.reject(names, fn name -> Enum.any?(patterns, &(Pattern.match?(&1, name) == true)) end)

    if additional == false do
      unless_fits(names == [], path, state, fn ->
        shown = names |> Enum.sort() |> Enum.take(8) |> Enum.map_join(", ", &shown/1)
        "additional properties are not allowed: #{shown}"
      end)
    else
      Enum.reduce(names, state, &apply_schema(additional, Map.fetch!(value, &1), [&1 | path], &2))
    end
  end

  defp keyword("propertyNames", schema, value, _schema, path, state) when is_map(value) do
    value |> Map.keys() |> Enum.reduce(state, &apply_schema(schema, &1, path, &2))
  end

  defp keyword("allOf", schemas, value, _schema, path, state),
    do: Enum.reduce(schemas, state, &apply_schema(&1, value, path, &2))

  defp keyword("anyOf", schemas, value, _schema, path, state) do
    {count, state} = count_fitting(schemas, value, 1, state)
    unless_fits(count > 0, path, state, fn -> "#{shown(value)} fits none of the alternatives" end)
  end

  defp keyword("oneOf", schemas, value, _schema, path, state) do
    {count, state} = count_fitting(schemas, value, 2, state)
    unless_fits(count == 1, path, state, fn -> "#{shown(value)} does not fit exactly one of the alternatives" end)
  end

  defp keyword("not", schema, value, _schema, path, state) do
    {fits, state} = fits(schema, value, state)
    unless_fits(not fits, path, state, fn -> "#{shown(value)} fits what it must not" end)
  end

  defp keyword("if", condition, value, schema, path, state) do
    {fits, state} = fits(condition, value, state)
    apply_schema(Map.get(schema, if(fits, do: "then", else: "else"), true), value, path, state)
  end

  defp keyword("$ref", _reference, _value, _schema, _path, %{references: 0}), do: throw({__MODULE__, :references})

  defp keyword("$ref", reference, value, _schema, path, state) do
    {:ok, schema} = Pointer.find(state.root, reference)
    apply_schema(schema, value, path, %{state | references: state.references - 1})
  end

  defp keyword(_keyword, _limit, _value, _schema, _path, state), do: state

  defp count_fitting(schemas, value, enough, state) do
    Enum.reduce_while(schemas, {0, state}, fn schema, {count, state} ->
      {fits, state} = fits(schema, value, state)
      count = if fits, do: count + 1, else: count
      {if(count == enough, do: :halt, else: :cont), {count, state}}
    end)
  end

  defp required(names, value, path, state) do
    Enum.reduce(names, state, fn name, state ->
      unless_fits(is_map_key(value, name), path, state, fn -> "#{shown(name)} is a required property" end)
    end)
  end

  defp items([item | rest], index, schema, path, %{count: count} = state) when count < @max_problems do
    items(rest, index + 1, schema, path, apply_schema(schema, item, [index | path], state))
  end

  defp items(_rest, _index, _schema, _path, state), do: state

  defp scalars?(%{"type" => type} = schema, items) when map_size(schema) == 1 and is_map_key(@scalars, type) do
    Enum.all?(items, &type?(type, &1))
  end

  defp scalars?(_schema, _items), do: false

  # -- values --------------------------------------------------------------------

  defp type?("null", value), do: value == nil
  defp type?("boolean", value), do: is_boolean(value)
  # Stricter than JSON Schema, to which 1.0 is an integer: it is not one to Python, nor to Elixir.
  defp type?("integer", value), do: is_integer(value)
  defp type?("number", value), do: is_number(value)
  defp type?("string", value), do: is_binary(value)
  defp type?("array", value), do: is_list(value)
  defp type?("object", value), do: is_map(value)

  # Of Python's characters, which are code points.
  defp characters(text), do: characters(text, 0)
  defp characters(<<_::utf8, rest::binary>>, count), do: characters(rest, count + 1)
  defp characters(_rest, count), do: count

  # As written, not as floats are: 0.3 is a multiple of 0.1.
  defp multiple?(value, factor) do
    {value, value_exp} = decimal(value)
    {factor, factor_exp} = decimal(factor)
    least = min(value_exp, factor_exp)
    rem(value * Integer.pow(10, value_exp - least), factor * Integer.pow(10, factor_exp - least)) == 0
  end

  defp decimal(number) when is_integer(number), do: {number, 0}

  defp decimal(number) do
    {mantissa, exponent} =
      case number |> Float.to_string() |> String.split("e") do
        [mantissa, exponent] -> {mantissa, String.to_integer(exponent)}
        [mantissa] -> {mantissa, 0}
      end

    [whole, part] = String.split(mantissa, ".")
    {String.to_integer(whole <> part), exponent - byte_size(part)}
  end

  # Equal for what JSON Schema calls equal: 1 and 1.0 are.
  defp identity(number) when is_float(number), do: if(trunc(number) == number, do: trunc(number), else: number)
  defp identity(items) when is_list(items), do: Enum.map(items, &identity/1)
  defp identity(map) when is_map(map), do: Map.new(map, fn {name, item} -> {name, identity(item)} end)
  defp identity(other), do: other

  # Never a long value within a message: itself if it is short, else what it is.
  defp shown(text) when is_binary(text) do
    if byte_size(text) <= 160 and characters(text) <= 40,
      do: inspect(text),
      else: "a string of #{characters(text)} characters"
  end

  defp shown(items) when is_list(items), do: "a list of #{length(items)} items"
  defp shown(map) when is_map(map), do: "an object of #{map_size(map)} members"
  defp shown(nil), do: "null"

  defp shown(number) when is_integer(number) and abs(number) >= 0x1_0000_0000_0000_0000_0000_0000_0000_0000 do
    "an integer of more than 128 bits"
  end

  defp shown(other), do: inspect(other)

  defp limit(text) when is_binary(text), do: text |> String.slice(0, 120)

  defp limit(other) do
    text = Text.compact(other)
    if String.length(text) <= 120, do: text, else: String.slice(text, 0, 120) <> "…"
  end
end
