defmodule Bridge.Value.Encoder do
  # Terms to trees of JSON and buffers. This file owns the walk, containers, records and tags.
  @moduledoc false

  import Bridge.Value.ArrayCodec, only: [is_array: 1]
  import Bridge.Value.Fault, only: [not_serializable: 3]

  alias Bridge.{Bytes, Frozenset, NDArray, NpScalar, Record, Ref, Table, Tool, Variable}
  alias Bridge.Value.{ArrayCodec, ArrowStream, Fault, Implementation, Keys, MomentCodec, ScalarCodec, Text}

  # Deeper data is almost always a mistake, and Python's stack ends.
  @max_depth 100
  # Items of all containers of one value, those of shared lists counted each time: they grow exponentially as a tree.
  @max_items 10_000_000
  # Below this, base64 is smaller than a frame of its own with its bookkeeping.
  @max_inline 64
  @max_class_name 1000
  @floats [:nan, :infinity, :neg_infinity]
  @kinds [:dataclass, :pydantic, :namedtuple, :enum, :record]
  @libraries %{"pyarrow" => "RecordBatch", "polars" => "Series", "pandas" => "Series"}

  defguardp is_json_int(term) when is_integer(term) and term >= -0x8000_0000_0000_0000 and term <= 0x7FFF_FFFF_FFFF_FFFF
  # nil, true and the rest are values, other atoms are names.
  defguardp is_name(term) when is_atom(term) and term not in [nil, true, false, :nan, :infinity, :neg_infinity]

  defstruct buffers: [], next: 0, items: 0, inline: false

  @opaque t :: %__MODULE__{buffers: [binary()], next: non_neg_integer(), items: non_neg_integer(), inline: boolean()}

  @spec new(non_neg_integer()) :: t()
  def new(first_buffer), do: %__MODULE__{next: first_buffer}

  @spec buffers(t()) :: [binary()]
  def buffers(encoder), do: Enum.reverse(encoder.buffers)

  @doc "The tree of one term, its buffers added to the encoder's. Throws faults."
  @spec encode(term(), t()) :: {term(), t()}
  def encode(term, encoder) do
    # Most values are JSON as they are: looking is cheaper than making them anew.
    if plain(term, @max_depth, 0),
      do: {term, encoder},
      else: tree(term, @max_depth, [], %{encoder | items: 0, inline: false})
  end

  # -- what is JSON already ------------------------------------------------------

  # How many items there are, or false if something stands in need of a tag, or is none.
  defp plain(term, _depth, count) when is_json_int(term) or is_float(term), do: count
  defp plain(term, _depth, count) when term in [nil, true, false], do: count
  defp plain(term, _depth, count) when is_binary(term), do: Text.valid?(term) && count
  defp plain(term, depth, count) when is_list(term) and depth > 0, do: plain_items(term, depth - 1, count)

  defp plain(term, depth, count) when is_map(term) and depth > 0 and not is_map_key(term, "$bridge") do
    plain_members(:maps.to_list(term), depth - 1, count)
  end

  defp plain(_term, _depth, _count), do: false

  defp plain_items(_items, _depth, count) when count > @max_items, do: false

  defp plain_items([item | rest], depth, count)
       when is_json_int(item) or is_float(item) or item in [nil, true, false] do
    plain_items(rest, depth, count + 1)
  end

  defp plain_items([item | rest], depth, count) do
    count = plain(item, depth, count + 1)
    count && plain_items(rest, depth, count)
  end

  defp plain_items([], _depth, count), do: count
  defp plain_items(_improper, _depth, _count), do: false

  defp plain_members(_members, _depth, count) when count > @max_items, do: false

  defp plain_members([{name, value} | rest], depth, count) when is_binary(name) do
    count = Text.valid?(name) && plain(value, depth, count + 1)
    count && plain_members(rest, depth, count)
  end

  defp plain_members([], _depth, count), do: count
  defp plain_members(_members, _depth, _count), do: false

  # -- the walk ------------------------------------------------------------------

  defp tree(term, _depth, _path, state) when is_json_int(term) or is_float(term), do: {term, state}
  defp tree(term, _depth, _path, state) when term in [nil, true, false], do: {term, state}
  defp tree(term, _depth, _path, state) when is_integer(term), do: {ScalarCodec.encode_int(term), state}
  defp tree(term, _depth, path, state) when is_binary(term), do: {text(term, path), state}
  defp tree(term, depth, path, state) when is_list(term), do: list(term, depth, path, state)
  defp tree(term, _depth, _path, state) when term in @floats, do: {ScalarCodec.encode_float(term), state}
  defp tree(term, depth, path, state) when is_struct(term), do: struct(term, depth, path, state)
  defp tree(term, depth, path, state) when is_map(term), do: map(term, depth, path, state)
  defp tree(term, _depth, path, state) when is_array(term), do: term |> ArrayCodec.encode(path) |> attach(state)
  defp tree(term, depth, path, state) when is_tuple(term), do: tuple(term, depth, path, state)
  defp tree(term, _depth, path, _state), do: refuse(term, path)

  defp text(term, path) do
    if Text.valid?(term) do
      term
    else
      not_serializable(path, "this binary is no UTF-8, so no text", "Send bytes: Bridge.Bytes.new(x).")
    end
  end

  defp list(items, depth, path, state) do
    state = enter(items, depth, path, state)
    if scalars?(items), do: {items, state}, else: items(items, 0, depth - 1, path, state, & &1, [])
  end

  # A list of numbers within other data need not be made anew.
  defp scalars?([item | rest]) when is_json_int(item) or is_float(item) or item in [nil, true, false],
    do: scalars?(rest)

  defp scalars?(rest), do: rest == []

  defp items([item | rest], index, depth, path, state, step, done) do
    {tree, state} = tree(item, depth, [step.(index) | path], state)
    items(rest, index + 1, depth, path, state, step, [tree | done])
  end

  defp items([], _index, _depth, _path, state, _step, done), do: {Enum.reverse(done), state}

  defp enter(_items, depth, path, _state) when depth <= 0 do
    not_serializable(path, "nested deeper than #{@max_depth} levels", "Flatten it; refer to parts by key.")
  end

  defp enter(items, _depth, path, state) do
    count = state.items + count(items, path)

    if count > @max_items do
      not_serializable(
        path,
        "more than #{@max_items} items in one value, those of shared lists counted each time",
        "Send an array, {{:f, 64}, shape, binary}, or an Arrow table instead of lists."
      )
    end

    %{state | items: count}
  end

  defp count(items, _path) when is_map(items), do: map_size(items)
  defp count(items, path), do: list_length(items, 0, path)

  defp list_length([_ | rest], count, path), do: list_length(rest, count + 1, path)
  defp list_length([], count, _path), do: count

  defp list_length(_, _count, path),
    do: not_serializable(path, "an improper list cannot cross the bridge", "End it with [].")

  defp map(map, depth, path, state) do
    if names?(:maps.keys(map)) do
      {fields, state} = fields(map, depth, path, state, :key)
      {if(is_map_key(fields, "$bridge"), do: %{"$bridge" => "dict", "value" => fields}, else: fields), state}
    else
      pairs(map, depth, path, state)
    end
  end

  defp names?([key | rest]) when is_binary(key) or is_name(key), do: names?(rest)
  defp names?(rest), do: rest == []

  # The members of a map whose keys are names; `step` says what a key is in the path.
  defp fields(map, depth, path, state, step) do
    state = enter(map, depth, path, state)
    {members, state} = members(:maps.to_list(map), depth - 1, path, state, step, [])
    fields = :maps.from_list(members)
    if map_size(fields) != map_size(map), do: beside(map, path)
    {fields, state}
  end

  defp members([{key, value} | rest], depth, path, state, step, done)
       when is_json_int(value) or is_float(value) or value in [nil, true, false] do
    members(rest, depth, path, state, step, [{name(key, path), value} | done])
  end

  defp members([{key, value} | rest], depth, path, state, step, done) do
    name = name(key, path)
    {tree, state} = tree(value, depth, [{step, name} | path], state)
    members(rest, depth, path, state, step, [{name, tree} | done])
  end

  defp members([], _depth, _path, state, _step, done), do: {done, state}

  defp name(key, _path) when is_name(key), do: Atom.to_string(key)

  defp name(key, path) when is_binary(key) do
    if Text.valid?(key),
      do: key,
      else: not_serializable([{:key, key} | path], "this key is no UTF-8, so no text", "Use Bridge.Bytes.")
  end

  defp name(key, path), do: not_serializable(path, "#{inspect(key, limit: 5)} is no name of a field", "Use a string.")

  @spec beside(map(), Fault.path()) :: no_return()
  defp beside(map, path) do
    twice = Enum.find(Map.keys(map), &(is_name(&1) and is_map_key(map, Atom.to_string(&1))))

    not_serializable(
      [{:key, Atom.to_string(twice)} | path],
      "the key #{inspect(twice)} is beside #{inspect(Atom.to_string(twice))}, and becomes the same on the wire",
      "Leave out one of them."
    )
  end

  # A map has no order, so that pairs are written in that of their keys: alike each time.
  defp pairs(map, depth, path, state) do
    pairs = Enum.sort(map)
    keys = Enum.map(pairs, fn {key, _value} -> if is_name(key), do: Atom.to_string(key), else: key end)
    state = enter(map, depth, path, state)
    {trees, state} = items(keys, 0, depth - 1, path, state, &{:map_key, &1}, [])
    check_keys(keys, path)

    {items, state} =
      [trees, pairs]
      |> Enum.zip()
      |> Enum.map_reduce(state, fn {tree, {key, value}}, state ->
        {value, state} = tree(value, depth - 1, [{:key, key} | path], state)
        {[tree, value], state}
      end)

    {%{"$bridge" => "map", "items" => items}, state}
  end

  defp check_keys(keys, path) do
    with wrong when wrong != :ok <- Keys.check(keys) do
      {message, remedy} = Keys.words(wrong)
      not_serializable(path, message, remedy)
    end
  end

  defp tuple({name, _value}, _depth, path, _state) when is_name(name) do
    not_serializable(
      path,
      "this pair begins with the atom #{inspect(name)}, as in a keyword list",
      "Of a keyword list send Map.new(list), of a pair like {:ok, value} the value alone."
    )
  end

  defp tuple({{type, bits}, shape, data}, _depth, path, _state)
       when is_name(type) and is_integer(bits) and is_tuple(shape) and is_binary(data) do
    not_serializable(
      path,
      "there are no arrays of #{inspect({type, bits})}",
      "Use {:s | :u | :f | :c, bits}, or Bridge.NDArray."
    )
  end

  defp tuple(tuple, depth, path, state) do
    {items, state} = tuple |> Tuple.to_list() |> list(depth, path, state)
    {%{"$bridge" => "tuple", "items" => items}, state}
  end

  # Bytes within a set are written inline: the number of a buffer would depend on the order that is being looked for.
  defp set(kind, set, depth, path, state) do
    items = MapSet.to_list(set)
    entered = enter(items, depth, path, state)
    {trees, inner} = items(items, 0, depth - 1, path, %{entered | inline: true}, &{:element, &1}, [])
    check_keys(items, path)
    {%{"$bridge" => kind, "items" => Enum.sort_by(trees, &Text.compact/1)}, %{inner | inline: state.inline}}
  end

  defp attach({tree, data}, state) do
    {Map.put(tree, "buffer", state.next), %{state | buffers: [data | state.buffers], next: state.next + 1}}
  end

  # -- structs -------------------------------------------------------------------

  defp struct(%Bytes{data: data} = bytes, _depth, path, state) when is_binary(data) do
    _ = path
    tree = %{"$bridge" => if(bytes.mutable, do: "bytearray", else: "bytes")}

    if byte_size(data) <= @max_inline or state.inline,
      do: {Map.put(tree, "base64", Base.encode64(data)), state},
      else: attach({tree, data}, state)
  end

  defp struct(%MapSet{} = set, depth, path, state), do: set("set", set, depth, path, state)

  defp struct(%Frozenset{items: %MapSet{} = set}, depth, path, state), do: set("frozenset", set, depth, path, state)
  defp struct(%Bridge.Complex{} = complex, _depth, path, state), do: {ScalarCodec.encode_complex(complex, path), state}
  defp struct(%Bridge.UUID{} = uuid, _depth, path, state), do: {ScalarCodec.encode_uuid(uuid, path), state}

  defp struct(%module{} = decimal, _depth, path, state) when module in [Bridge.Decimal, Decimal] do
    {ScalarCodec.encode_decimal(decimal, path), state}
  end

  defp struct(%module{} = moment, _depth, path, state)
       when module in [Date, Time, NaiveDateTime, DateTime, Bridge.Zoned, Bridge.Timedelta] do
    {MomentCodec.encode(moment, path), state}
  end

  defp struct(%NDArray{} = array, _depth, path, state), do: array |> ArrayCodec.encode(path) |> attach(state)
  defp struct(%NpScalar{} = scalar, _depth, path, state), do: {ArrayCodec.encode_scalar(scalar, path), state}
  defp struct(%Table{} = table, _depth, path, state), do: table |> table(path) |> attach(state)
  defp struct(%Record{} = record, depth, path, state), do: record(record, depth, path, state)

  defp struct(%Ref{} = ref, _depth, path, state) do
    unless ref.version == nil or (is_json_int(ref.version) and ref.version >= 0) do
      not_serializable(path, "a Bridge.Ref's version must be a 64-bit integer from 0", "Pass an integer, or nil.")
    end

    tree = %{"$bridge" => "ref", "id" => member(ref.id, path)}
    tree = if ref.class in [nil, ""], do: tree, else: Map.put(tree, "class", member(ref.class, path))
    {if(ref.version, do: Map.put(tree, "version", ref.version), else: tree), state}
  end

  defp struct(%Tool{} = tool, depth, path, state) do
    tree = %{"$bridge" => "tool", "name" => member(tool.name, path)}

    tree =
      if tool.description in [nil, ""], do: tree, else: Map.put(tree, "description", member(tool.description, path))

    case tool.schema do
      nil ->
        {tree, state}

      %{} = schema when not is_struct(schema) ->
        {schema, state} = fields(schema, depth, path, state, :schema)
        {Map.put(tree, "schema", schema), state}

      _ ->
        not_serializable(path, "a Bridge.Tool's schema must be a map", "Pass a JSON Schema.")
    end
  end

  defp struct(%Variable{name: name}, _depth, path, state) do
    {%{"$bridge" => "variable", "name" => member(name, path)}, state}
  end

  defp struct(%{__struct__: Nx.Tensor} = tensor, _depth, path, state) do
    tensor |> ArrayCodec.encode_tensor(path) |> attach(state)
  end

  defp struct(%module{} = struct, depth, path, state) do
    case Implementation.of(struct) do
      nil ->
        refuse(struct, path)

      implementation when depth > 0 ->
        # One level deeper: a `to_value/1` that returns its own argument must end.
        tree(implementation.to_value(struct), depth - 1, path, state)

      _ ->
        not_serializable(path, "nested deeper than #{@max_depth} levels", "Does to_value/1 of #{inspect(module)} end?")
    end
  end

  defp record(%Record{kind: kind, class: class} = record, depth, path, state) do
    unless kind in @kinds and is_map(record.fields) and not is_struct(record.fields) do
      not_serializable(path, "this Bridge.Record is none", "Make it with Bridge.Record.new/3.")
    end

    class = member(class, path)

    if byte_size(class) > @max_class_name and String.length(class) > @max_class_name do
      not_serializable(path, "its class's name is longer than #{@max_class_name} characters", "Shorten it.")
    end

    tree = %{"$bridge" => Atom.to_string(kind), "class" => class}

    if kind == :enum do
      {Map.put(tree, "name", member(record.fields["name"], path)), state}
    else
      {fields, state} = fields(record.fields, depth, path, state, :field)
      more(record, Map.put(tree, "fields", fields), depth, path, state)
    end
  end

  defp more(%Record{kind: :pydantic} = record, tree, depth, path, state) do
    set = for name <- record.fields_set || Record.keys(record), do: member(name, path)
    tree = Map.put(tree, "fields_set", set)

    Enum.reduce([{"extra", record.extra}, {"private", record.private}], {tree, state}, fn
      {_name, nil}, made ->
        made

      {name, %{} = part}, {tree, state} ->
        {part, state} = fields(part, depth, path, state, :field)
        {Map.put(tree, name, part), state}
    end)
  end

  defp more(_record, tree, _depth, _path, state), do: {tree, state}

  defp member(text, path) when is_binary(text), do: text(text, path)

  defp member(other, path),
    do: not_serializable(path, "a name within it must be a string, not #{inspect(other, limit: 5)}", "Convert it.")

  defp table(%Table{library: library, type: type} = table, path) do
    unless is_map_key(@libraries, library) and type in [nil, @libraries[library]] and is_binary(table.data) and
             (library == "pandas" or (table.name == nil and table.freq == nil)) and
             (table.name == nil or type == "Series") do
      not_serializable(path, "this Bridge.Table is none", "Its library is \"polars\", \"pyarrow\" or \"pandas\".")
    end

    try do
      ArrowStream.check(table.data, path)
    catch
      {Fault, _name, path, message, remedy} ->
        not_serializable(path, message, remedy || "Write it as an Arrow IPC stream.")
    end

    tree = %{"$bridge" => "table", "library" => library}

    more =
      for {name, text} <- [{"type", type}, {"name", table.name}, {"freq", table.freq}],
          text,
          do: {name, member(text, path)}

    {Enum.into(more, tree), table.data}
  end

  # -- what cannot cross ---------------------------------------------------------

  @spec refuse(term(), Fault.path()) :: no_return()
  defp refuse(term, path), do: not_serializable(path, what(term), remedy(term))

  defp what(atom) when is_atom(atom), do: "the atom #{inspect(atom)} cannot cross the bridge"
  defp what(term), do: "a #{Text.kind(term)} cannot cross the bridge"

  defp remedy(atom) when is_atom(atom), do: "Send a string: Atom.to_string(x)."

  defp remedy(fun) when is_function(fun) do
    "Register it: Bridge.Tools.register(session, name, fun), and pass Bridge.Tools.tool!(session, name)."
  end

  defp remedy(%module{}) when module in [Range, Stream], do: "Convert it: Enum.to_list(x)."
  defp remedy(%URI{}), do: "Convert it: to_string(x)."
  defp remedy(%Regex{}), do: "Send its source: Regex.source(x)."

  defp remedy(%module{}) do
    if String.starts_with?(inspect(module), "Bridge."),
      do: "Its parts are not what they should be: see the documentation of #{inspect(module)}.",
      else: "Derive or implement Bridge.Encodable for #{inspect(module)}, or send Map.from_struct(x)."
  end

  defp remedy(bits) when is_bitstring(bits), do: "Pad it to whole bytes, and send Bridge.Bytes.new(x)."
  defp remedy(_term), do: "Convert it to plain data first."
end
