defmodule Bridge.Schema.Check do
  # Whether a term is a JSON Schema: what the meta-schema says of the keywords followed, and what it cannot.
  @moduledoc false

  alias Bridge.Schema.{Pattern, Pointer}
  alias Bridge.Value.Fault

  @dialect "https://json-schema.org/draft/2020-12/schema"
  @max_bytes 65_536
  @max_depth 64
  @types ~w(array boolean integer null number object string)
  @not_followed ~w(unevaluatedProperties unevaluatedItems $dynamicRef)
  @top_only ~w($id x-bridge)

  @rules %{
    "type" => :types,
    "enum" => :list,
    "required" => :names,
    "dependentRequired" => :lists_of_names,
    "pattern" => :pattern,
    "$ref" => :reference,
    "multipleOf" => :positive,
    "uniqueItems" => :boolean
  }
  @numbers ~w(minimum maximum exclusiveMinimum exclusiveMaximum)
  @counts ~w(minLength maxLength minItems maxItems minProperties maxProperties minContains maxContains)
  @schemas ~w(items additionalProperties contains propertyNames not if then else)
  @lists_of_schemas ~w(prefixItems anyOf oneOf allOf)
  @maps_of_schemas ~w(properties patternProperties dependentSchemas $defs)
  @rules [
           {@numbers, :number},
           {@counts, :count},
           {@schemas, :schema},
           {@lists_of_schemas, :schemas},
           {@maps_of_schemas, :named}
         ]
         |> Enum.flat_map(fn {names, rule} -> Enum.map(names, &{&1, rule}) end)
         |> Enum.into(@rules)

  @spec check(term()) :: :ok | {:error, String.t()}
  def check(schema) do
    dialect = if is_map(schema), do: Map.get(schema, "$schema", @dialect), else: @dialect

    cond do
      not json?(schema, @max_depth * 4) ->
        {:error, "a schema is JSON: maps with strings for keys"}

      dialect not in [@dialect, @dialect <> "#"] ->
        {:error, "it must be a JSON Schema of 2020-12, not of #{shown(dialect)}"}

      :erlang.external_size(schema) > 4 * @max_bytes ->
        {:error, "it is longer than #{@max_bytes} bytes"}

      true ->
        part(schema, schema, [], @max_depth)
    end
  catch
    {__MODULE__, path, message} ->
      {:error,
       IO.iodata_to_binary([
         path |> Enum.reverse() |> Enum.map(&Fault.key_step/1),
         if(path == [], do: "", else: ": "),
         message
       ])}
  end

  defp json?(_term, 0), do: false

  defp json?(map, left) when is_map(map),
    do: not is_struct(map) and Enum.all?(map, fn {key, value} -> is_binary(key) and json?(value, left - 1) end)

  defp json?(list, left) when is_list(list), do: not List.improper?(list) and Enum.all?(list, &json?(&1, left - 1))
  defp json?(term, _left), do: is_binary(term) or is_number(term) or term in [nil, true, false]

  defp part(_schema, _root, path, depth) when depth < 0, do: no(path, "it is nested deeper than #{@max_depth} levels")
  defp part(schema, _root, _path, _depth) when is_boolean(schema), do: :ok

  defp part(schema, root, path, depth) when is_map(schema) do
    for name <- @not_followed,
        is_map_key(schema, name),
        do: no([name | path], "this host does not follow #{inspect(name)}")

    if path != [],
      do:
        for(
          name <- @top_only,
          is_map_key(schema, name),
          do: no(path, "#{inspect(name)} may only be at the top of a schema")
        )

    for {name, value} <- schema, rule = @rules[name] do
      rule(rule, name, value, root, [name | path], depth)
    end

    :ok
  end

  defp part(_schema, _root, path, _depth), do: no(path, "a schema is an object, true or false")

  defp rule(:types, _name, type, _root, path, _depth) do
    unless type in @types or (is_list(type) and type != [] and type -- @types == [] and Enum.uniq(type) == type) do
      no(tl(path), ~s("type" must be one of #{Enum.join(@types, ", ")}, or a list of them))
    end
  end

  defp rule(:list, name, value, _root, path, _depth),
    do: unless(is_list(value), do: no(tl(path), "#{inspect(name)} must be a list"))

  defp rule(:names, name, value, _root, path, _depth) do
    unless is_list(value) and Enum.all?(value, &is_binary/1) and Enum.uniq(value) == value do
      no(tl(path), "#{inspect(name)} must be a list of distinct strings")
    end
  end

  defp rule(:lists_of_names, name, value, root, path, depth) do
    unless is_map(value), do: no(tl(path), "#{inspect(name)} must be an object")
    for {key, names} <- value, do: rule(:names, key, names, root, [key | path], depth)
  end

  defp rule(:pattern, _name, value, _root, path, _depth), do: pattern(value, path)

  defp rule(:reference, _name, value, root, path, _depth) do
    cond do
      not is_binary(value) ->
        no(tl(path), ~s("$ref" must be a string))

      not String.starts_with?(value, "#") ->
        no(tl(path), "#{shown(value)} is not in the schema, and nothing is fetched")

      Pointer.find(root, value) == :error ->
        no(tl(path), "#{shown(value)} is not in the schema")

      true ->
        :ok
    end
  end

  defp rule(:positive, name, value, _root, path, _depth) do
    unless is_number(value) and value > 0, do: no(tl(path), "#{inspect(name)} must be a number above 0")
  end

  defp rule(:boolean, name, value, _root, path, _depth) do
    unless is_boolean(value), do: no(tl(path), "#{inspect(name)} must be true or false")
  end

  defp rule(:number, name, value, _root, path, _depth) do
    unless is_number(value), do: no(tl(path), "#{inspect(name)} must be a number")
  end

  defp rule(:count, name, value, _root, path, _depth) do
    unless (is_integer(value) or (is_float(value) and trunc(value) == value)) and value >= 0 do
      no(tl(path), "#{inspect(name)} must be an integer from 0")
    end
  end

  defp rule(:schema, _name, value, root, path, depth), do: part(value, root, path, depth - 1)

  defp rule(:schemas, name, value, root, path, depth) do
    unless is_list(value) and value != [], do: no(tl(path), "#{inspect(name)} must be a list of schemas")
    for {schema, index} <- Enum.with_index(value), do: part(schema, root, [index | path], depth - 1)
  end

  defp rule(:named, name, value, root, path, depth) do
    unless is_map(value), do: no(tl(path), "#{inspect(name)} must be an object of schemas")

    for {key, schema} <- value do
      if name == "patternProperties", do: pattern(key, path)
      part(schema, root, [key | path], depth - 1)
    end
  end

  defp pattern(text, path) do
    with true <- is_binary(text), {:error, reason} <- Pattern.compile(text) do
      no(tl(path), "the pattern #{shown(text)} is none: #{reason}")
    else
      false -> no(tl(path), ~s("pattern" must be a string))
      {:ok, _compiled} -> :ok
    end
  end

  defp shown(text), do: inspect(text, printable_limit: 100, limit: 5)

  @spec no(list(), String.t()) :: no_return()
  defp no(path, message), do: throw({__MODULE__, path, message})
end
