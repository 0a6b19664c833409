defmodule Bridge.Value.Decoder do
  # Trees of JSON and buffers to terms. This file owns the walk, containers, records and tags.
  @moduledoc false

  import Bridge.Value.Fault, only: [malformed: 2, too_much: 3, too_much: 2]
  import Bridge.Value.Kinds, only: [member: 4, optional: 4]

  alias Bridge.{Bytes, Frozenset, Record, Ref, Table, Tool, Variable}
  alias Bridge.Value.{ArrayCodec, ArrowStream, Fault, Keys, Kinds, MomentCodec, ScalarCodec}

  @max_depth 100
  @max_class_name 1000
  @libraries %{"pyarrow" => "RecordBatch", "polars" => "Series", "pandas" => "Series"}
  @records %{"dataclass" => :dataclass, "pydantic" => :pydantic, "namedtuple" => :namedtuple, "record" => :record}

  defguardp is_scalar(tree) when is_binary(tree) or is_number(tree) or tree in [nil, true, false]

  # `left` are the buffers that no value has taken, by number.
  defstruct [:left, :count, :hook, :nx, :decimal]

  @opaque t :: %__MODULE__{
            left: %{optional(non_neg_integer()) => binary()},
            count: non_neg_integer(),
            hook: (struct() -> term()) | nil,
            nx: boolean(),
            decimal: boolean() | nil
          }

  @spec new([binary()], keyword()) :: t()
  def new(buffers, opts) do
    %__MODULE__{
      left: buffers |> Enum.with_index() |> Map.new(fn {data, index} -> {index, data} end),
      count: length(buffers),
      hook: opts[:hook],
      nx: Keyword.get(opts, :nx, false),
      decimal: opts[:decimal]
    }
  end

  @doc "The term of one tree. Throws faults."
  @spec decode(term(), t()) :: {term(), t()}
  def decode(tree, decoder) do
    # What has no tag in it is the value, as it is.
    if plain?(tree, @max_depth), do: {tree, decoder}, else: value(tree, @max_depth, [], decoder)
  end

  @doc "Throws the fault of a buffer that no value took."
  @spec finish(t()) :: :ok
  def finish(%__MODULE__{left: left}) do
    if map_size(left) == 0,
      do: :ok,
      else: malformed([], "buffer #{left |> Map.keys() |> Enum.min()} belongs to nothing in it")
  end

  defp plain?(tree, _depth) when is_scalar(tree), do: true
  defp plain?(tree, depth) when is_list(tree) and depth > 0, do: plain_items?(tree, depth - 1)

  defp plain?(tree, depth) when is_map(tree) and depth > 0 and not is_map_key(tree, "$bridge") do
    plain_members?(:maps.to_list(tree), depth - 1)
  end

  defp plain?(_tree, _depth), do: false

  defp plain_items?([item | rest], depth) when is_scalar(item), do: plain_items?(rest, depth)
  defp plain_items?([item | rest], depth), do: plain?(item, depth) and plain_items?(rest, depth)
  defp plain_items?(rest, _depth), do: rest == []

  defp plain_members?([{name, tree} | rest], depth) when is_binary(name),
    do: plain?(tree, depth) and plain_members?(rest, depth)

  defp plain_members?(rest, _depth), do: rest == []

  # -- the walk ------------------------------------------------------------------

  defp value(tree, _depth, _path, state) when is_scalar(tree), do: {tree, state}
  defp value(tree, depth, path, state) when is_list(tree), do: items(tree, depth, path, state, & &1)

  defp value(%{"$bridge" => kind} = tree, depth, path, state) do
    Kinds.check(tree, path)
    tagged(kind, tree, depth, path, state)
  end

  defp value(tree, depth, path, state) when is_map(tree) and not is_struct(tree),
    do: fields(tree, depth, path, state, :key)

  defp value(tree, _depth, path, _state),
    do: malformed(path, "#{inspect(tree, limit: 3, printable_limit: 60)} is not JSON")

  defp items(trees, depth, path, state, step) do
    cond do
      not is_list(trees) -> malformed(path, "a list of values was expected")
      depth <= 0 -> too_deep(path)
      plain_scalars?(trees) -> {trees, state}
      true -> items(trees, 0, depth - 1, path, state, step, [])
    end
  end

  defp items([tree | rest], index, depth, path, state, step, done) do
    {value, state} = value(tree, depth, [step.(index) | path], state)
    items(rest, index + 1, depth, path, state, step, [value | done])
  end

  defp items([], _index, _depth, _path, state, _step, done), do: {Enum.reverse(done), state}
  defp items(_rest, _index, _depth, path, _state, _step, _done), do: malformed(path, "an improper list is not JSON")

  defp plain_scalars?([item | rest]) when is_scalar(item), do: plain_scalars?(rest)
  defp plain_scalars?(rest), do: rest == []

  # The members of an object that all stand for themselves.
  defp fields(trees, depth, path, state, step) do
    cond do
      not is_map(trees) or is_struct(trees) -> malformed(path, "an object of values was expected")
      depth <= 0 -> too_deep(path)
      true -> trees |> :maps.to_list() |> fields(depth - 1, path, state, step, [])
    end
  end

  defp fields([{name, tree} = member | rest], depth, path, state, step, done)
       when is_binary(name) and is_scalar(tree) do
    fields(rest, depth, path, state, step, [member | done])
  end

  defp fields([{name, tree} | rest], depth, path, state, step, done) when is_binary(name) do
    {value, state} = value(tree, depth, [{step, name} | path], state)
    fields(rest, depth, path, state, step, [{name, value} | done])
  end

  defp fields([], _depth, _path, state, _step, done), do: {:maps.from_list(done), state}

  defp fields(_members, _depth, path, _state, _step, _done),
    do: malformed(path, "a key of a JSON object must be a string")

  @spec too_deep(Fault.path()) :: no_return()
  defp too_deep(path) do
    too_much(path, "nested deeper than #{@max_depth} levels", "Flatten it on the side that sends it.")
  end

  defp take(%{"buffer" => index} = _tree, path, state) do
    case state.left do
      %{^index => data} when is_integer(index) ->
        {data, %{state | left: Map.delete(state.left, index)}}

      _ when is_integer(index) and index >= 0 and index < state.count ->
        malformed(path, "buffer #{index} is used twice")

      _ ->
        malformed(path, ~s("buffer" must be an integer from 0 to #{state.count - 1}))
    end
  end

  # -- kinds ---------------------------------------------------------------------

  defp tagged("int", tree, _depth, path, state), do: {ScalarCodec.decode_int(tree, path), state}
  defp tagged("float", tree, _depth, path, state), do: {ScalarCodec.decode_float(tree, path), state}
  defp tagged("complex", tree, _depth, path, state), do: {ScalarCodec.decode_complex(tree, path), state}
  defp tagged("uuid", tree, _depth, path, state), do: {ScalarCodec.decode_uuid(tree, path), state}

  # Looking for a module that is not there takes a millisecond: once, and only if there is a decimal.
  defp tagged("decimal", tree, depth, path, %{decimal: nil} = state) do
    tagged("decimal", tree, depth, path, %{state | decimal: Code.ensure_loaded?(Decimal)})
  end

  defp tagged("decimal", tree, _depth, path, state), do: {ScalarCodec.decode_decimal(tree, state.decimal, path), state}

  defp tagged(kind, tree, _depth, path, state) when kind in ["bytes", "bytearray"] do
    {data, state} =
      case {is_map_key(tree, "base64"), is_map_key(tree, "buffer")} do
        {true, false} -> {ScalarCodec.decode_base64(tree, path), state}
        {false, true} -> take(tree, path, state)
        _ -> malformed(path, ~s(a "#{kind}" has either "base64" or "buffer"))
      end

    {%Bytes{data: data, mutable: kind == "bytearray"}, state}
  end

  defp tagged(kind, tree, _depth, path, state) when kind in ["date", "time", "datetime", "timedelta"] do
    {MomentCodec.decode(kind, tree, path), state}
  end

  defp tagged("tuple", tree, depth, path, state) do
    {items, state} = items(tree["items"], depth, path, state, & &1)
    {List.to_tuple(items), state}
  end

  defp tagged(kind, tree, depth, path, state) when kind in ["set", "frozenset"] do
    {items, state} = items(tree["items"], depth, path, state, &{:element, &1})
    check_keys(items, path)
    set = MapSet.new(items)
    {if(kind == "set", do: set, else: %Frozenset{items: set}), state}
  end

  defp tagged("map", tree, depth, path, state) do
    pairs = member(tree, "items", :list, path)

    unless Enum.all?(pairs, &match?([_, _], &1)),
      do: malformed(path, ~s("items" of a "map" must be pairs, [key, value]))

    {keys, state} = pairs |> Enum.map(&hd/1) |> items(depth, path, state, &{:map_key, &1})
    check_keys(keys, path)

    {members, state} =
      [keys, pairs]
      |> Enum.zip()
      |> Enum.map_reduce(state, fn {key, [_, tree]}, state ->
        {value, state} = value(tree, depth - 1, [{:key, key} | path], state)
        {{key, value}, state}
      end)

    {Map.new(members), state}
  end

  defp tagged("dict", tree, depth, path, state), do: fields(tree["value"], depth, path, state, :key)

  defp tagged("ndarray", tree, _depth, path, state) do
    {data, state} = take(tree, path, state)
    {ArrayCodec.decode(tree, data, state.nx, path), state}
  end

  defp tagged("npscalar", tree, _depth, path, state), do: {ArrayCodec.decode_scalar(tree, path), state}

  defp tagged("table", tree, _depth, path, state) do
    library = member(tree, "library", :string, path)
    [type, name, freq] = for part <- ~w(type name freq), do: optional(tree, part, :string, path)

    unless is_map_key(@libraries, library) and type in [nil, "", @libraries[library]] do
      malformed(path, ~s("library" and "type" of a "table" are none that go together))
    end

    if (name || freq) && library != "pandas", do: malformed(path, "a table of #{library} must not have name or freq")
    if name && type != "Series", do: malformed(path, ~s(only a pandas "Series" has a "name"))
    {data, state} = take(tree, path, state)
    ArrowStream.check(data, path)
    {%Table{library: library, data: data, type: if(type != "", do: type), name: name, freq: freq}, state}
  end

  defp tagged("enum", tree, _depth, path, state) do
    class = class(tree, path)
    {%Record{kind: :enum, class: class, fields: %{"name" => member(tree, "name", :string, path)}}, state}
  end

  defp tagged(kind, tree, depth, path, state) when is_map_key(@records, kind) do
    class = class(tree, path)
    {fields, state} = fields(tree["fields"], depth, path, state, :field)
    more(%Record{kind: Map.fetch!(@records, kind), class: class, fields: fields}, tree, depth, path, state)
  end

  defp tagged("ref", tree, _depth, path, state) do
    class = optional(tree, "class", :string, path)
    version = optional(tree, "version", :integer, path)
    tag(%Ref{id: member(tree, "id", :string, path), class: if(class != "", do: class), version: version}, state)
  end

  defp tagged("tool", tree, depth, path, state) do
    {schema, state} =
      if is_map_key(tree, "schema"), do: fields(tree["schema"], depth, path, state, :schema), else: {nil, state}

    text = optional(tree, "description", :string, path) || ""
    tag(%Tool{name: member(tree, "name", :string, path), description: text, schema: schema}, state)
  end

  defp tagged("variable", tree, _depth, path, state),
    do: tag(%Variable{name: member(tree, "name", :string, path)}, state)

  defp tag(tag, %{hook: nil} = state), do: {tag, state}
  defp tag(tag, %{hook: hook} = state), do: {hook.(tag), state}

  defp check_keys(keys, path) do
    case Keys.check(keys) do
      :ok -> :ok
      :same_hash -> too_much(path, elem(Keys.words(:same_hash), 0), "Send a list of pairs.")
      wrong -> malformed(path, elem(Keys.words(wrong), 0))
    end
  end

  defp class(tree, path) do
    class = member(tree, "class", :string, path)

    cond do
      byte_size(class) > @max_class_name and String.length(class) > @max_class_name ->
        too_much(path, ~s("class" is longer than #{@max_class_name} characters))

      # Python's own module has no classes of these kinds.
      tree["$bridge"] != "record" and String.starts_with?(class, "builtins.") ->
        malformed(path, "#{String.slice(class, 0, 120)} is not a class of the kind #{inspect(tree["$bridge"])}")

      true ->
        class
    end
  end

  defp more(%Record{kind: :pydantic} = record, tree, depth, path, state) do
    set = member(tree, "fields_set", :list, path)

    unless Enum.all?(set, &is_binary/1) and Enum.uniq(set) == set do
      malformed(path, ~s("fields_set" must be a list of distinct strings))
    end

    {extra, state} = part(tree, "extra", depth, path, state)
    {private, state} = part(tree, "private", depth, path, state)
    {%{record | fields_set: set, extra: extra, private: private}, state}
  end

  defp more(record, _tree, _depth, _path, state), do: {record, state}

  defp part(tree, name, depth, path, state) do
    if is_map_key(tree, name), do: fields(tree[name], depth, path, state, :field), else: {nil, state}
  end
end
