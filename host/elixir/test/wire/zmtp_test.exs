defmodule Bridge.Wire.ZMTPTest do
  use ExUnit.Case, async: true

  alias Bridge.Wire.ZMTP

  @greeting <<0xFF, 0::64, 0x7F, 3, 1, "NULL", 0::128, 0, 0::248>>

  # What a peer sends: its greeting, READY, then messages of every size, PINGs between them and between their frames.
  defp conversation do
    long = :binary.copy("x", 300)

    bytes =
      IO.iodata_to_binary([
        @greeting,
        ready("ROUTER"),
        message(["a"]),
        ping("one"),
        message(["", "", ""]),
        <<1, 3, "top">>,
        ping(""),
        <<0, 2, "ic">>,
        message([long, "", long]),
        command("FUTURE", "whatever"),
        # A short frame whose size is written in eight bytes.
        <<3, 1::64, "s", 2, 2::64, "ss">>,
        ping(:binary.copy("c", 16)),
        message([:binary.copy("y", 255), :binary.copy("z", 256)])
      ])

    events = [
      :ready,
      {:message, ["a"]},
      {:message, ["", "", ""]},
      {:message, ["top", "ic"]},
      {:message, [long, "", long]},
      {:message, ["s", "ss"]},
      {:message, [:binary.copy("y", 255), :binary.copy("z", 256)]}
    ]

    {bytes, events, pong("one") <> pong("") <> pong(:binary.copy("c", 16))}
  end

  describe "what is sent first" do
    test "is the greeting of 3.1 with the mechanism NULL, and READY with the socket's type" do
      assert {_t, first} = ZMTP.new(:dealer, identity: "me")
      expected = <<5, "READY", 11, "Socket-Type", 6::32, "DEALER", 8, "Identity", 2::32, "me">>
      assert IO.iodata_to_binary(first) == @greeting <> <<4, byte_size(expected)>> <> expected

      assert {_t, first} = ZMTP.new(:sub)
      expected = <<5, "READY", 11, "Socket-Type", 3::32, "SUB">>
      assert IO.iodata_to_binary(first) == @greeting <> <<4, byte_size(expected)>> <> expected
    end
  end

  describe "bytes" do
    test "are the same messages wherever they are cut" do
      {bytes, events, pongs} = conversation()

      for place <- 0..byte_size(bytes) do
        <<first::binary-size(place), second::binary>> = bytes
        assert feed_all([first, second]) == {events, pongs}, "cut at #{place}"
      end
    end

    test "may come one by one" do
      {bytes, events, pongs} = conversation()
      assert feed_all(for <<byte <- bytes>>, do: <<byte>>) == {events, pongs}
    end

    test "may come in any pieces, empty ones too" do
      {bytes, events, pongs} = conversation()
      :rand.seed(:exsss, {1, 2, 3})
      for _ <- 1..300, do: assert(feed_all(pieces(bytes)) == {events, pongs})
    end

    test "of a message are out as soon as its last one is in" do
      {bytes, events, _pongs} = conversation()
      t = elem(ZMTP.new(:dealer), 0)
      size = byte_size(bytes) - 1
      <<most::binary-size(size), last::binary>> = bytes
      assert {:ok, t, early, _out} = ZMTP.feed(t, most)
      assert early == Enum.drop(events, -1)
      assert {:ok, _t, [last_event], []} = ZMTP.feed(t, last)
      assert last_event == List.last(events)
    end

    test "that are rubbish are an error or not understood yet, and nothing else" do
      :rand.seed(:exsss, {4, 5, 6})
      {bytes, _events, _pongs} = conversation()
      start = @greeting <> ready("ROUTER")

      for n <- 1..3000 do
        rubbish =
          case rem(n, 3) do
            0 -> :rand.bytes(:rand.uniform(200))
            1 -> start <> :rand.bytes(:rand.uniform(200))
            2 -> altered(bytes)
          end

        for type <- [:dealer, :sub, :req] do
          case feed(type, pieces(rubbish)) do
            {:ok, events, _out} -> assert Enum.all?(events, &(&1 == :ready or match?({:message, [_ | _]}, &1)))
            {:error, {:refused, text}} -> assert String.valid?(text)
            {:error, reason} -> assert is_atom(reason)
          end
        end
      end
    end
  end

  describe "a greeting" do
    test "of 3.0, and of a later 3.x, is accepted" do
      for minor <- [0, 1, 2, 255] do
        greeting = <<0xFF, 0::64, 0x7F, 3, minor, "NULL", 0::128, 0, 0::248>>
        assert {:ok, [:ready], ""} = feed(:dealer, [greeting, ready("ROUTER")])
      end

      # The eight bytes between are not defined, and neither is the filler; libzmq writes a 1 there.
      greeting = <<0xFF, 1::64, 0x7F, 3, 1, "NULL", 0::128, 1, -1::248>>
      assert {:ok, [:ready], ""} = feed(:dealer, [greeting, ready("ROUTER")])
    end

    test "of no ZeroMQ is refused with its first byte" do
      assert {:error, :not_zmtp} = feed(:dealer, ["H"])
      assert {:error, :not_zmtp} = feed(:dealer, ["HTTP/1.1 400 Bad Request\r\n\r\n"])
      assert {:error, :not_zmtp} = feed(:dealer, [<<0xFF, 0::64>>, <<0x7E>>])
    end

    test "of an old version is refused with the byte that says so" do
      for major <- 0..2, do: assert({:error, :unsupported_version} = feed(:dealer, [<<0xFF, 0::64, 0x7F, major>>]))
    end

    test "with another mechanism is refused" do
      for mechanism <- ["PLAIN", "CURVE", "NULLX", "null"] do
        padded = mechanism <> :binary.copy(<<0>>, 20 - byte_size(mechanism))

        assert {:error, :unsupported_mechanism} =
                 feed(:dealer, [<<0xFF, 0::64, 0x7F, 3, 1, padded::binary, 0, 0::248>>])
      end
    end
  end

  describe "a handshake" do
    test "is with a socket that fits" do
      fits = %{dealer: ~w(ROUTER DEALER REP), sub: ~w(PUB XPUB), req: ~w(REP ROUTER)}
      all = ~w(ROUTER DEALER REP REQ PUB XPUB SUB XSUB PUSH PULL PAIR STREAM dealer) ++ ["", "ROUTERX"]

      for {type, partners} <- fits, theirs <- all do
        expected = if theirs in partners, do: {:ok, [:ready], ""}, else: {:error, :incompatible_peer}
        assert feed(type, [@greeting, ready(theirs)]) == expected, "#{type} with #{theirs}"
      end
    end

    test "may say more, in any order, its names in any case" do
      properties = property("X-Other", "1") <> property("SOCKET-type", "ROUTER") <> property("Identity", "")
      assert {:ok, [:ready], ""} = feed(:dealer, [@greeting, command("READY", properties)])
    end

    test "that is malformed is refused" do
      for properties <- ["", "x", property("Identity", ""), property("Socket-Type", "ROUTER") <> "x", <<0, 0::32>>] do
        assert {:error, :malformed_command} = feed(:dealer, [@greeting, command("READY", properties)])
      end

      assert {:error, :malformed_command} = feed(:dealer, [@greeting, <<4, 0>>])
      assert {:error, :malformed_command} = feed(:dealer, [@greeting, <<4, 1, 9>>])
      assert {:error, :malformed_command} = feed(:dealer, [@greeting, command("HELLO", "")])
      assert {:error, :malformed_command} = feed(:dealer, [@greeting, ready("ROUTER"), ready("ROUTER")])
      assert {:error, :unexpected_message} = feed(:dealer, [@greeting, message(["early"])])
    end

    test "that the peer refuses says why" do
      assert feed(:dealer, [@greeting, command("ERROR", <<6, "go", 255, "way">>)]) ==
               {:error, {:refused, ~S("go\xFFway")}}
    end
  end

  describe "a frame" do
    test "with reserved flags, or a command that has more, is refused" do
      for flags <- [5, 7, 8, 16, 0x80, 0xFF] do
        assert {:error, :malformed_frame} = feed(:dealer, [@greeting, ready("ROUTER"), <<flags>>])
      end
    end

    test "is refused when it is announced, before a byte of it has come" do
      opts = [max_message_bytes: 1000, max_frames: 3]
      start = [@greeting, ready("ROUTER")]
      full = :binary.copy("x", 1000)

      assert {:ok, [:ready, {:message, [^full]}], ""} = feed(:dealer, start ++ [message([full])], opts)
      assert {:error, :message_too_large} = feed(:dealer, start ++ [<<2, 1001::64>>], opts)
      assert {:error, :message_too_large} = feed(:dealer, start ++ [<<2, -1::64>>], opts)
      assert {:error, :message_too_large} = feed(:dealer, start ++ [<<3, 1000::64, full::binary, 0, 1>>], opts)

      assert {:error, :message_too_large} =
               feed(:dealer, start ++ [<<3, 999::64>>, binary_part(full, 0, 999), <<0, 2>>], opts)

      assert {:ok, [:ready, {:message, ["", "", ""]}], ""} = feed(:dealer, start ++ [<<1, 0, 1, 0, 0, 0>>], opts)
      assert {:error, :too_many_frames} = feed(:dealer, start ++ [<<1, 0, 1, 0, 1, 0, 0, 0>>], opts)

      # The limits are a message's: the next one has all of them.
      half = binary_part(full, 0, 500)
      two = :binary.copy(message([half, half, ""]), 2)
      whole = {:message, [half, half, ""]}
      assert {:ok, [:ready, ^whole, ^whole], ""} = feed(:dealer, start ++ [two], opts)
    end

    test "of the handshake and a command are small, whatever messages may be" do
      for flags <- [6], size <- [65_537, 0x1000_0000, 0xFFFF_FFFF_FFFF_FFFF] do
        assert {:error, :command_too_large} = feed(:dealer, [@greeting, <<flags, size::64>>])
        assert {:error, :command_too_large} = feed(:dealer, [@greeting, ready("ROUTER"), <<flags, size::64>>])
      end

      long = command("FUTURE", :binary.copy("x", 65_529))
      assert {:ok, [:ready], ""} = feed(:dealer, [@greeting, ready("ROUTER"), long])
    end

    test "of which a part is here costs little more than that part, however small the pieces" do
      {:ok, t, [:ready], _out} =
        ZMTP.feed(elem(ZMTP.new(:dealer), 0), @greeting <> ready("ROUTER") <> <<2, 0x10_0000::64>>)

      t =
        Enum.reduce(1..0xF_FFFF, t, fn _, t ->
          {:ok, t, [], []} = ZMTP.feed(t, "x")
          t
        end)

      assert :erlang.external_size(t) < 0x11_0000
      # A list of a million pieces would be 16 MB and more.
      assert :erts_debug.flat_size(t) * 8 < 100_000

      assert {:ok, _t, [message: [body]], []} = ZMTP.feed(t, "x")
      assert body == :binary.copy("x", 0x10_0000)
    end

    test "of 200 MiB arrives in pieces of 64 KiB" do
      {:ok, t, [:ready], _out} =
        ZMTP.feed(elem(ZMTP.new(:dealer), 0), @greeting <> ready("ROUTER") <> <<2, 0xC80_0000::64>>)

      piece = :binary.copy("p", 0x1_0000)

      t =
        Enum.reduce(1..3199, t, fn _, t ->
          {:ok, t, [], []} = ZMTP.feed(t, piece)
          t
        end)

      # None of the pieces was copied on the way: the list of them is all that grew.
      assert :erts_debug.flat_size(t) * 8 < 1_000_000
      assert {:ok, _t, [message: [body], message: ["next"]], []} = ZMTP.feed(t, piece <> message(["next"]))
      assert byte_size(body) == 0xC80_0000
      assert :binary.at(body, 0xC7F_FFFF) == ?p
    end

    test "is one of many: thousands in one piece, and a message of 4,096" do
      start = [@greeting, ready("ROUTER")]
      many = for n <- 1..5000, do: message([Integer.to_string(n)])
      assert {:ok, [:ready | messages], ""} = feed(:dealer, start ++ [IO.iodata_to_binary(many)])
      assert messages == for(n <- 1..5000, do: {:message, [Integer.to_string(n)]})

      frames = for n <- 1..4096, do: Integer.to_string(n)
      assert {:ok, [:ready, {:message, ^frames}], ""} = feed(:dealer, start ++ [message(frames)])
      assert {:error, :too_many_frames} = feed(:dealer, start ++ [message(frames ++ ["one"])])
    end
  end

  describe "a PING" do
    test "is answered with its own words, also before the rest of a message" do
      start = [@greeting, ready("ROUTER")]
      assert {:ok, [:ready], pong} = feed(:dealer, start ++ [<<1, 3, "abc">>, ping("ctx"), <<0, 9>>])
      assert pong == pong("ctx")
    end

    test "with more words than there may be is refused, and so is one without its time" do
      start = [@greeting, ready("ROUTER")]
      assert {:error, :malformed_command} = feed(:dealer, start ++ [ping(:binary.copy("c", 17))])
      assert {:error, :malformed_command} = feed(:dealer, start ++ [command("PING", "x")])
    end

    test "'s answer means nothing to us" do
      assert {:ok, [:ready], ""} = feed(:dealer, [@greeting, ready("ROUTER"), pong("x")])
    end
  end

  describe "a message to be sent" do
    test "is what the other end reads" do
      for frames <- [
            [""],
            ["a"],
            ["", "b", ""],
            [:binary.copy("x", 255)],
            [:binary.copy("x", 256), ["io", [?d, "ata"]]]
          ] do
        sent = IO.iodata_to_binary(ZMTP.message(frames))
        assert sent == message(Enum.map(frames, &IO.iodata_to_binary/1))
        read = Enum.map(frames, &IO.iodata_to_binary/1)
        assert {:ok, [:ready, {:message, ^read}], ""} = feed(:dealer, [@greeting, ready("DEALER"), sent])
      end
    end

    test "has frames that are not copied" do
      large = :binary.copy("x", 100_000)
      assert Enum.any?(List.flatten([ZMTP.message(["a", large])]), &:erts_debug.same(&1, large))
    end

    test "of a REQ begins with an empty frame, and so does the answer, which nobody sees" do
      {t, _first} = ZMTP.new(:req)
      assert IO.iodata_to_binary(ZMTP.message(t, ["beat"])) == <<1, 0, 0, 4, "beat">>
      start = [@greeting, ready("REP")]
      assert {:ok, [:ready, {:message, ["beat", "two"]}], ""} = feed(:req, start ++ [message(["", "beat", "two"])])
      assert {:error, :missing_delimiter} = feed(:req, start ++ [message(["beat"])])
      assert {:error, :missing_delimiter} = feed(:req, start ++ [message(["x", "", "beat"])])

      {t, _first} = ZMTP.new(:dealer)
      assert IO.iodata_to_binary(ZMTP.message(t, ["beat"])) == <<0, 4, "beat">>
    end

    test "that subscribes is one that every version understands" do
      assert IO.iodata_to_binary(ZMTP.subscribe("topic")) == <<0, 6, 1, "topic">>
      assert IO.iodata_to_binary(ZMTP.subscribe("")) == <<0, 1, 1>>
    end
  end

  # Feeds the pieces one after the other: all events and all that was to be sent, or the error.
  defp feed(type, pieces, opts \\ []) do
    {t, _first} = ZMTP.new(type, opts)

    Enum.reduce_while(pieces, {:ok, t, [], ""}, fn piece, {:ok, t, events, sent} ->
      case ZMTP.feed(t, piece) do
        {:ok, t, more, output} -> {:cont, {:ok, t, events ++ more, sent <> IO.iodata_to_binary(output)}}
        {:error, reason} -> {:halt, {:error, reason}}
      end
    end)
    |> case do
      {:ok, _t, events, sent} -> {:ok, events, sent}
      error -> error
    end
  end

  defp feed_all(pieces) do
    assert {:ok, events, sent} = feed(:dealer, pieces)
    {events, sent}
  end

  defp pieces(""), do: [""]

  defp pieces(bytes) do
    size = min(:rand.uniform(40) - 1, byte_size(bytes))
    <<piece::binary-size(size), rest::binary>> = bytes
    if rest == "", do: [piece], else: [piece | pieces(rest)]
  end

  defp altered(bytes) do
    place = :rand.uniform(byte_size(bytes)) - 1
    <<before::binary-size(place), _, rest::binary>> = bytes
    before <> :rand.bytes(1) <> rest
  end

  # The other end, written from the specification and not from the code.
  defp message(frames) do
    {last, rest} = List.pop_at(frames, -1)
    IO.iodata_to_binary([Enum.map(rest, &frame(1, &1)), frame(0, last)])
  end

  defp frame(more, body) when byte_size(body) < 256, do: <<more, byte_size(body), body::binary>>
  defp frame(more, body), do: <<more + 2, byte_size(body)::64, body::binary>>

  defp command(name, data) do
    body = <<byte_size(name), name::binary, data::binary>>
    if byte_size(body) < 256, do: <<4, byte_size(body), body::binary>>, else: <<6, byte_size(body)::64, body::binary>>
  end

  defp ready(type), do: command("READY", property("Socket-Type", type) <> property("Identity", ""))
  defp property(name, value), do: <<byte_size(name), name::binary, byte_size(value)::32, value::binary>>
  defp ping(context), do: command("PING", <<0, 10>> <> context)
  defp pong(context), do: command("PONG", context)
end
