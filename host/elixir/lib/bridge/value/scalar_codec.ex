defmodule Bridge.Value.ScalarCodec do
  # The kinds of single values that JSON cannot carry, but for moments: numbers, bytes within the tree, UUIDs.
  @moduledoc false

  import Bridge.Value.Fault, only: [malformed: 2, not_serializable: 3]
  import Bridge.Value.Kinds, only: [member: 4]

  alias Bridge.Value.Fault

  @floats %{nan: "nan", infinity: "inf", neg_infinity: "-inf"}
  @float_names Map.new(@floats, fn {atom, name} -> {name, atom} end)

  @spec encode_int(integer()) :: map()
  # Hexadecimal, through bytes: it takes linear time, whatever the length.
  def encode_int(number) do
    digits = number |> abs() |> :binary.encode_unsigned() |> Base.encode16(case: :lower)
    digits = with "0" <> rest when rest != "" <- digits, do: rest
    %{"$bridge" => "int", "hex" => if(number < 0, do: "-" <> digits, else: digits)}
  end

  @spec decode_int(map(), Fault.path()) :: integer()
  def decode_int(tree, path) do
    case member(tree, "hex", :string, path) do
      "-" <> digits -> -from_hex(digits, path)
      digits -> from_hex(digits, path)
    end
  end

  defp from_hex(digits, path) do
    even = if rem(byte_size(digits), 2) == 0, do: digits, else: "0" <> digits

    case Base.decode16(even, case: :lower) do
      {:ok, bytes} when bytes != "" ->
        :binary.decode_unsigned(bytes)

      _ ->
        malformed(path, ~s("hex" of an "int" must be lower-case hexadecimal digits, with "-" before them if negative))
    end
  end

  @spec encode_float(:nan | :infinity | :neg_infinity) :: map()
  def encode_float(name), do: %{"$bridge" => "float", "value" => Map.fetch!(@floats, name)}

  @spec decode_float(map(), Fault.path()) :: :nan | :infinity | :neg_infinity
  def decode_float(%{"value" => name}, path) do
    Map.get(@float_names, name) || malformed(path, ~s("value" of a "float" must be "nan", "inf" or "-inf"))
  end

  @spec encode_complex(Bridge.Complex.t(), Fault.path()) :: map()
  def encode_complex(%{real: real, imag: imag}, path) do
    %{"$bridge" => "complex", "real" => encode_part(real, path), "imag" => encode_part(imag, path)}
  end

  defp encode_part(part, _path) when is_float(part), do: part
  defp encode_part(part, _path) when is_map_key(@floats, part), do: encode_float(part)

  defp encode_part(_part, path),
    do: not_serializable(path, "the parts of a Bridge.Complex must be floats", "Write 1.0 for 1.")

  @spec decode_complex(map(), Fault.path()) :: Bridge.Complex.t()
  def decode_complex(%{"real" => real, "imag" => imag}, path) do
    %Bridge.Complex{real: decode_part(real, path), imag: decode_part(imag, path)}
  end

  defp decode_part(part, _path) when is_float(part), do: part

  defp decode_part(%{"$bridge" => "float", "value" => name} = tree, _path)
       when map_size(tree) == 2 and is_map_key(@float_names, name),
       do: Map.fetch!(@float_names, name)

  defp decode_part(_part, path), do: malformed(path, ~s("real" and "imag" of a "complex" must be floats))

  @spec encode_decimal(struct(), Fault.path()) :: map()
  def encode_decimal(%Bridge.Decimal{value: text}, path) do
    if Bridge.Decimal.valid?(text) do
      %{"$bridge" => "decimal", "value" => text}
    else
      not_serializable(
        path,
        "a Bridge.Decimal whose value is no number as Python writes it",
        "Make it with Bridge.Decimal.new/1."
      )
    end
  end

  def encode_decimal(package, path), do: package |> Bridge.Decimal.of_package() |> encode_decimal(path)

  @spec decode_decimal(map(), boolean(), Fault.path()) :: struct()
  def decode_decimal(tree, package?, path) do
    text = member(tree, "value", :string, path)

    cond do
      not Bridge.Decimal.valid?(text) ->
        malformed(path, ~s("value" of a "decimal" must be a number as Python writes a Decimal))

      package? ->
        Bridge.Decimal.to_package(%Bridge.Decimal{value: text})

      true ->
        %Bridge.Decimal{value: text}
    end
  end

  @spec encode_uuid(Bridge.UUID.t(), Fault.path()) :: map()
  def encode_uuid(%{value: text}, path) do
    if Bridge.UUID.valid?(text) do
      %{"$bridge" => "uuid", "value" => text}
    else
      not_serializable(path, "a Bridge.UUID whose value is none", "Make it with Bridge.UUID.new/1.")
    end
  end

  @spec decode_uuid(map(), Fault.path()) :: Bridge.UUID.t()
  def decode_uuid(tree, path) do
    text = member(tree, "value", :string, path)

    if Bridge.UUID.valid?(text) do
      %Bridge.UUID{value: text}
    else
      malformed(path, ~s("value" of a "uuid" must be 8-4-4-4-12 lower-case hexadecimal digits))
    end
  end

  @spec decode_base64(map(), Fault.path()) :: binary()
  def decode_base64(tree, path) do
    case tree |> member("base64", :string, path) |> Base.decode64() do
      {:ok, bytes} -> bytes
      :error -> malformed(path, ~s("base64" is not base64))
    end
  end
end
