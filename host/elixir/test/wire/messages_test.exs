defmodule Bridge.Wire.MessagesTest do
  # The vectors that all implementations share, and what else holds of Bridge.Wire.Frames and Bridge.Wire.RPC.
  use ExUnit.Case, async: true

  alias Bridge.{Error, JSON}
  alias Bridge.Wire.{Frames, RPC}

  {:ok, vectors} = Path.expand("../../../../tests/vectors/messages.json", __DIR__) |> File.read!() |> JSON.decode()
  @key vectors["key"]
  @messages vectors["messages"]
  @malformed vectors["malformed"]
  @malformed_frames vectors["malformed_frames"]

  test "there are vectors of every kind" do
    assert vectors = [@messages, @malformed, @malformed_frames]
    assert Enum.map(vectors, &length/1) |> Enum.min() > 15
  end

  for {vector, index} <- Enum.with_index(@messages) do
    test "the vector is read, is written byte for byte, and means the same: #{vector["name"]}" do
      vector = message(unquote(index))
      is_read(vector)
      is_written(vector)
      has_the_content_of_its_parts(vector)
      if vector["jsonrpc"], do: comes_back_as_it_went(vector["jsonrpc"])
    end
  end

  for vector <- @malformed do
    test "a message that is none is refused with #{vector["code"]}: #{vector["name"]}" do
      assert {:error, %Error{code: unquote(vector["code"])}} = RPC.parse(unquote(vector["data"]))
    end
  end

  @reasons %{
    "no frames" => :no_delimiter,
    "no delimiter" => :no_delimiter,
    "too few" => :too_few_frames,
    "unsigned" => :bad_signature,
    "signed in upper case" => :bad_signature,
    "signed with another key" => :bad_signature,
    "content altered" => :bad_signature,
    "header altered" => :bad_signature,
    "parent altered" => :bad_signature,
    "metadata altered" => :bad_signature,
    "frames swapped" => :bad_signature,
    "nine identities" => :no_delimiter,
    "replayed" => :replayed,
    "larger than the limit" => :too_large,
    "a header that is an array" => :malformed_header,
    "a header without msg_type" => :malformed_header,
    "a header that is not JSON" => :malformed_header,
    "a header that is not UTF-8" => :malformed_header
  }

  for {vector, index} <- Enum.with_index(@malformed_frames) do
    test "frames that are no message are refused: #{vector["name"]}" do
      vector = malformed_frames(unquote(index))
      opts = if max = vector["max_bytes"], do: [max_bytes: max], else: []

      seen =
        Enum.reduce(vector["after"] || [], Frames.seen_new(), fn before, seen ->
          assert {:ok, _message, seen} = Frames.unpack(frames(before), @key, seen)
          seen
        end)

      reason = Map.fetch!(@reasons, vector["name"])
      assert {:error, ^reason, _seen} = Frames.unpack(frames(vector["frames"]), @key, seen, opts)
    end
  end

  describe "frames" do
    test "that are packed are unpacked, with text beyond ASCII and buffers" do
      content = JSON.encode!(%{"text" => "naïve ✓"})
      packed = Frames.pack("k", "m-1", "comm_msg", "s", content, ["", <<0, 255>>, ["a", ?b]])
      assert {:ok, message, _seen} = unpack(packed)
      assert message.content == %{"text" => "naïve ✓"}
      assert message.buffers == ["", <<0, 255>>, "ab"]
      assert {:ok, _date, 0} = DateTime.from_iso8601(message.header["date"])
      assert %{"msg_id" => "m-1", "username" => "bridge", "version" => "5.4"} = message.header
    end

    test "whose one bit is another are refused, whichever it is" do
      packed = Enum.map(Frames.pack("k", "m", "comm_msg", "s", ~s({"a":1})), &IO.iodata_to_binary/1)

      for {frame, index} <- Enum.with_index(packed), place <- 0..(bit_size(frame) - 1) do
        <<before::bits-size(place), bit::1, rest::bits>> = frame
        altered = List.replace_at(packed, index, <<before::bits, 1 - bit::1, rest::bits>>)
        assert {:error, reason, _seen} = Frames.unpack(altered, "k", Frames.seen_new())
        assert reason in [:bad_signature, :no_delimiter]
      end
    end

    test "may be 4,096 and no more, and never exceed the limit by a byte" do
      packed = Frames.pack("k", "m", "comm_msg", "s", "{}", List.duplicate("", 4090))
      assert {:ok, %{buffers: buffers}, _seen} = unpack(packed)
      assert length(buffers) == 4090
      assert {:error, :too_many_frames, _seen} = unpack(packed ++ [""])

      size = IO.iodata_length(packed)
      assert {:ok, _message, _seen} = unpack(packed, max_bytes: size)
      assert {:error, :too_large, _seen} = unpack(packed, max_bytes: size - 1)
    end

    test "with eight identities are a message" do
      identities = List.duplicate("i", 8)
      packed = Frames.pack("k", "m", "comm_msg", "s", "{}", [], identities: identities)
      assert {:ok, %{identities: ^identities}, _seen} = unpack(packed)
    end

    test "signed, but with parts that are no objects, are refused by the part's name" do
      for {index, reason} <- [{0, :header}, {1, :parent}, {2, :metadata}, {3, :content}],
          wrong <- ["[]", "1", "null", "", "{", "\xFF"] do
        header = ~s({"msg_id":"m","msg_type":"t"})
        signed = List.replace_at([header, "{}", "{}", "{}"], index, wrong)
        signature = Base.encode16(:crypto.mac(:hmac, :sha256, "k", signed), case: :lower)
        reason = :"malformed_#{reason}"
        assert {:error, ^reason, _seen} = unpack(["<IDS|MSG>", signature | signed])
      end
    end

    test "are refused by a rule about a header's member that is not a string" do
      for name <- ["msg_id", "msg_type", "session", "username", "date", "version"] do
        header = JSON.canonical(%{"msg_id" => "m", "msg_type" => "t"} |> Map.put(name, 1))
        signature = Base.encode16(:crypto.mac(:hmac, :sha256, "k", [header, "{}{}{}"]), case: :lower)
        assert {:error, :malformed_header, _seen} = unpack(["<IDS|MSG>", signature, header, "{}", "{}", "{}"])
      end
    end

    test "received before are refused, as long as they are among the last ones" do
      sign = fn n -> Enum.map(Frames.pack("k", "m#{n}", "t", "s", "{}", [], date: ""), &IO.iodata_to_binary/1) end

      take = fn n, seen ->
        {:ok, _message, seen} = Frames.unpack(sign.(n), "k", seen)
        seen
      end

      seen = Enum.reduce(1..100, Frames.seen_new(100), take)

      for last <- 101..250, reduce: seen do
        seen ->
          seen = take.(last, seen)
          for n <- (last - 99)..last, do: assert({:error, :replayed, ^seen} = Frames.unpack(sign.(n), "k", seen))
          seen
      end

      # However many there were, what is remembered is bounded: the first ones have made room by now.
      seen = Enum.reduce(101..201, seen, take)
      assert {:ok, _message, _seen} = Frames.unpack(sign.(1), "k", seen)
    end

    test "are remembered 65,536 at a time" do
      assert Frames.seen_new() == Frames.seen_new(65_536)
    end

    test "that were refused are not remembered" do
      packed = Enum.map(Frames.pack("k", "m", "t", "s", "{}"), &IO.iodata_to_binary/1)
      assert {:error, :bad_signature, seen} = Frames.unpack(packed, "another", Frames.seen_new())
      assert {:ok, _message, _seen} = Frames.unpack(packed, "k", seen)
    end

    test "that are kept keep nothing alive that they came in" do
      chunk = :binary.copy("b", 1_000_000)
      small = binary_part(chunk, 10, 100)
      large = binary_part(chunk, 0, 900_000)
      packed = Enum.map(Frames.pack("k", "m", "t", "s", "{}"), &IO.iodata_to_binary/1)
      assert {:ok, %{buffers: [small, large]}, _} = Frames.unpack(packed ++ [small, large], "k", Frames.seen_new())
      assert :binary.referenced_byte_size(small) == 100
      # What is most of it is not copied.
      assert :binary.referenced_byte_size(large) == 1_000_000
    end
  end

  describe "a JSON-RPC message" do
    test "without params has empty ones" do
      assert RPC.decode(%{"jsonrpc" => "2.0", "id" => "a", "method" => "m"}) == {:request, "a", "m", %{}}
      assert RPC.decode(%{"jsonrpc" => "2.0", "method" => "m"}) == {:notification, "m", %{}}
    end

    test "may have members that nobody knows" do
      assert RPC.decode(%{"jsonrpc" => "2.0", "id" => 1, "result" => nil, "new" => 1}) == {:result, 1, nil}
    end

    test "may be an error without an id" do
      error = %{"code" => -32700, "message" => "not JSON"}

      assert {:failure, nil, %Error{name: :parse_error, message: "not JSON"}} =
               RPC.decode(%{"jsonrpc" => "2.0", "id" => nil, "error" => error})
    end

    test "is one, or a parse error, or an invalid request, whatever came" do
      :rand.seed(:exsss, {7, 8, 9})
      whole = JSON.canonical(RPC.failure("id", Error.new(:tool_error, "ünsinn")))

      texts =
        for(_ <- 1..1000, do: :rand.bytes(:rand.uniform(60))) ++
          for(place <- 0..(byte_size(whole) - 1), do: binary_part(whole, 0, place)) ++
          for(
            place <- 0..(byte_size(whole) - 1),
            do: binary_part(whole, 0, place) <> "}" <> binary_part(whole, place + 1, byte_size(whole) - place - 1)
          )

      for text <- texts do
        case RPC.parse(text) do
          {:error, error} -> assert error.name in [:parse_error, :invalid_request]
          {:failure, _id, %Error{}} -> :ok
        end
      end

      members = [
        {"jsonrpc", ["2.0", "2"]},
        {"id", [1, "a", nil, 1.5]},
        {"method", ["m", 1]},
        {"params", [%{}, [], nil]}
      ]

      members = members ++ [{"result", [1, nil]}, {"error", [nil, %{}, %{"code" => 1, "message" => ""}]}]

      for _ <- 1..3000 do
        object = for {name, values} <- members, :rand.uniform(2) == 1, into: %{}, do: {name, Enum.random(values)}

        case RPC.decode(object) do
          {:error, error} -> assert error.name == :invalid_request
          message -> assert elem(message, 0) in [:request, :notification, :result, :failure]
        end
      end
    end
  end

  defp is_read(vector) do
    assert {:ok, message, _seen} = Frames.unpack(frames(vector["frames"]), @key, Frames.seen_new())

    for name <- ["identities", "header", "parent", "metadata", "content"] do
      assert Map.fetch!(message, String.to_existing_atom(name)) == vector[name]
    end

    assert message.buffers == Enum.map(vector["buffers"], &Base.decode64!/1)
    assert message.content["data"] == (vector["jsonrpc"] || %{})
  end

  defp is_written(vector) do
    frames = frames(vector["frames"])

    [_delimiter, signature, _header, parent, _metadata, content | buffers] =
      Enum.drop(frames, length(vector["identities"]))

    %{"msg_id" => id, "msg_type" => type, "session" => session, "date" => date} = vector["header"]
    opts = [date: date, parent: parent, identities: vector["identities"]]
    packed = Frames.pack(@key, id, type, session, content, buffers, opts)

    assert Enum.map(packed, &IO.iodata_to_binary/1) == frames
    assert signature == vector["signature"]
  end

  defp has_the_content_of_its_parts(vector) do
    %{"comm_id" => comm} = vector["content"]
    content = Enum.at(vector["frames"], length(vector["identities"]) + 5)
    # The order of the members within the data is not ours to say.
    [_, data] = String.split(content, ~s("data":), parts: 2)
    data = binary_part(data, 0, byte_size(data) - 1)

    made =
      case vector["header"]["msg_type"] do
        "comm_msg" -> Frames.comm_message(comm, data)
        "comm_open" -> Frames.comm_open(comm, vector["content"]["target_name"], data)
        "comm_close" -> Frames.comm_close(comm)
      end

    assert IO.iodata_to_binary(made) == content
  end

  defp comes_back_as_it_went(object) do
    again =
      case RPC.decode(object) do
        {:request, id, method, params} -> RPC.request(id, method, params)
        {:notification, method, params} -> RPC.notification(method, params)
        {:result, id, result} -> RPC.result(id, result)
        {:failure, id, error} -> RPC.failure(id, error)
      end

    assert again == object
    assert RPC.parse(JSON.canonical(again)) == RPC.decode(object)
  end

  defp message(index), do: Enum.at(@messages, index)
  defp malformed_frames(index), do: Enum.at(@malformed_frames, index)

  defp unpack(frames, opts \\ []),
    do: Frames.unpack(Enum.map(frames, &IO.iodata_to_binary/1), "k", Frames.seen_new(), opts)

  defp frames(frames) do
    Enum.map(frames, fn
      %{"base64" => text} -> Base.decode64!(text)
      text -> text
    end)
  end
end
