defmodule Bridge.Value.ArrayCodec do
  # Arrays and scalars of NumPy: `{type, shape, binary}`, tensors of Nx, `Bridge.NDArray`, `Bridge.NpScalar`.
  @moduledoc false

  import Bridge.Value.Fault, only: [malformed: 2, not_serializable: 3, too_much: 2]
  import Bridge.Value.Kinds, only: [member: 4]

  alias Bridge.{NDArray, NpScalar}
  alias Bridge.Value.{DType, Fault, ScalarCodec, Text}

  # Items that take no bytes: nothing else bounds how many a peer may declare.
  @max_hollow 1_000_000

  @dtypes %{
    {:s, 8} => "|i1",
    {:s, 16} => "<i2",
    {:s, 32} => "<i4",
    {:s, 64} => "<i8",
    {:u, 8} => "|u1",
    {:u, 16} => "<u2",
    {:u, 32} => "<u4",
    {:u, 64} => "<u8",
    {:f, 16} => "<f2",
    {:f, 32} => "<f4",
    {:f, 64} => "<f8",
    {:c, 64} => "<c8",
    {:c, 128} => "<c16"
  }
  @types Map.new(@dtypes, fn {type, dtype} -> {dtype, type} end)

  @doc "Whether a term is an array as a plain tuple."
  defguard is_array(term)
           when is_tuple(term) and tuple_size(term) == 3 and is_map_key(@dtypes, elem(term, 0)) and
                  is_tuple(elem(term, 1)) and is_binary(elem(term, 2))

  @doc "The tree without its buffer, and the buffer."
  @spec encode(NDArray.t() | {tuple(), tuple(), binary()}, Fault.path()) :: {map(), binary()}
  def encode({type, shape, data}, path) when is_tuple(shape) do
    encode(%NDArray{dtype: Map.fetch!(@dtypes, type), shape: shape, data: data}, path)
  end

  def encode(%NDArray{dtype: dtype, shape: shape, data: data, order: order}, path) do
    unless is_tuple(shape) and is_binary(data) and order in ["C", "F"] do
      not_serializable(
        path,
        "this Bridge.NDArray is none",
        "Give it a shape that is a tuple, data, and order \"C\" or \"F\"."
      )
    end

    lengths = Tuple.to_list(shape)
    as_unserializable(fn -> check_size(dtype, DType.shape(lengths, path), data, path) end)
    {%{"$bridge" => "ndarray", "dtype" => dtype, "shape" => lengths, "order" => order}, data}
  end

  @doc "As `encode/2`, of a tensor of Nx. Nx is called, and need not be there when this is compiled."
  @spec encode_tensor(struct(), Fault.path()) :: {map(), binary()}
  def encode_tensor(%{type: type, shape: shape} = tensor, path) do
    names = tensor |> Map.get(:names, []) |> Enum.any?()

    cond do
      not is_map_key(@dtypes, type) ->
        not_serializable(path, "NumPy has no type #{inspect(type)}", "Convert it: Nx.as_type(x, {:f, 32}).")

      names ->
        not_serializable(path, "the names of its axes would be lost", "Drop them: Nx.rename(x, …) with nil for each.")

      true ->
        encode({type, shape, apply(Nx, :to_binary, [tensor])}, path)
    end
  end

  @spec encode_scalar(NpScalar.t(), Fault.path()) :: map()
  def encode_scalar(%NpScalar{dtype: "str", data: text}, path) do
    if is_binary(text) and Text.valid?(text) do
      %{"$bridge" => "npscalar", "dtype" => "str", "text" => text}
    else
      not_serializable(path, "a Bridge.NpScalar of \"str\" must be UTF-8", "Use dtype: \"bytes\".")
    end
  end

  def encode_scalar(%NpScalar{dtype: dtype, data: data}, path) when is_binary(data) do
    as_unserializable(fn -> check_scalar(dtype, data, path) end)
    %{"$bridge" => "npscalar", "dtype" => dtype, "base64" => Base.encode64(data)}
  end

  def encode_scalar(_scalar, path), do: not_serializable(path, "a Bridge.NpScalar's data must be a binary", "Mend it.")

  # The same checks as of what a peer sends, of what the caller made.
  defp as_unserializable(check) do
    check.()
  catch
    {Fault, _name, path, message, _remedy} -> not_serializable(path, message, "Compare dtype, shape and data.")
  end

  @spec decode(map(), binary(), boolean(), Fault.path()) :: NDArray.t() | tuple() | struct()
  def decode(%{"dtype" => dtype, "order" => order} = tree, data, nx?, path) do
    lengths = DType.shape(tree["shape"], path)
    if order not in ["C", "F"], do: malformed(path, ~s("order" must be "C" or "F"))
    check_size(dtype, lengths, data, path)
    shape = List.to_tuple(lengths)

    case @types do
      %{^dtype => type} when order == "C" -> if nx?, do: tensor(type, shape, data), else: {type, shape, data}
      _ -> %NDArray{dtype: dtype, shape: shape, data: data, order: order}
    end
  end

  # Nx has no tensors without items.
  defp tensor(type, shape, ""), do: {type, shape, ""}
  defp tensor(type, shape, data), do: apply(Nx, :reshape, [apply(Nx, :from_binary, [data, type]), shape])

  defp check_size(dtype, lengths, data, path) do
    {size, items} = {DType.item_size(dtype, path), DType.product(lengths)}

    cond do
      size * items != byte_size(data) ->
        malformed(path, "#{items} items of #{size} bytes do not make a buffer of #{byte_size(data)} bytes")

      size == 0 and items > @max_hollow ->
        too_much(path, "more than #{@max_hollow} items of no bytes")

      true ->
        :ok
    end
  end

  @spec decode_scalar(map(), Fault.path()) :: NpScalar.t()
  def decode_scalar(%{"dtype" => "str"} = tree, path) do
    if not is_map_key(tree, "text") or is_map_key(tree, "base64"),
      do: malformed(path, ~s(a "npscalar" of "str" has "text"))

    %NpScalar{dtype: "str", data: member(tree, "text", :string, path)}
  end

  def decode_scalar(%{"dtype" => dtype} = tree, path) do
    if not is_map_key(tree, "base64") or is_map_key(tree, "text"), do: malformed(path, ~s(a "npscalar" has "base64"))
    data = ScalarCodec.decode_base64(tree, path)
    check_scalar(dtype, data, path)
    %NpScalar{dtype: dtype, data: data}
  end

  defp check_scalar("bytes", _data, _path), do: :ok

  defp check_scalar(dtype, data, path) do
    if DType.item_size(dtype, path) != byte_size(data) or
         match?(<<_order, kind, _::binary>> when kind in [?S, ?U], dtype) do
      malformed(path, "#{byte_size(data)} bytes are no scalar of this dtype")
    end
  end
end
