defmodule Bridge.Wire.ConnTest do
  # What one comm sends, and what it makes of what comes: no socket, no process.
  use ExUnit.Case, async: true

  alias Bridge.{Error, JSON}
  alias Bridge.Wire.{Conn, Frames}

  @key "a key"

  setup do
    {:ok, conn, 1, _out} = Conn.request(Conn.new(@key), :who, "function.call", "{}", [])
    {:ok, conn: conn}
  end

  defp frames(type, content, opts \\ []) do
    id = Base.encode16(:rand.bytes(8))
    content = content |> JSON.encode!() |> IO.iodata_to_binary()
    packed = Frames.pack(@key, id, type, "k", content, opts[:buffers] || [], Keyword.take(opts, [:parent]))
    ["comm-x" | Enum.map(packed, &IO.iodata_to_binary/1)]
  end

  defp said(conn, data, opts \\ []) do
    data = if is_map(data), do: Map.put_new(data, "jsonrpc", "2.0"), else: data
    content = %{"comm_id" => opts[:comm] || conn.comm_id, "data" => data}
    conn |> Conn.receive(frames("comm_msg", content, opts)) |> elem(1)
  end

  test "an answer goes to who waits, once", %{conn: conn} do
    answer =
      frames(
        "comm_msg",
        %{"comm_id" => conn.comm_id, "data" => %{"jsonrpc" => "2.0", "id" => 1, "result" => %{"value" => 2}}},
        buffers: ["b"]
      )

    assert {conn, {:answer, :who, {:ok, %{"value" => 2}, ["b"]}}} = Conn.receive(conn, answer)
    assert Conn.owner(conn, 1) == nil
    # The very same frames are a replay.
    assert {_conn, {:dropped, :replayed}} = Conn.receive(conn, answer)
    assert {:dropped, :late} = said(conn, %{"id" => 1, "result" => %{}})
  end

  test "an answer that is none is an error for who waits: there will be no other", %{conn: conn} do
    for answer <- [
          %{"id" => 1, "result" => [1]},
          %{"id" => 1, "result" => nil},
          %{"id" => 1, "error" => "no"},
          %{"id" => 1, "error" => %{"code" => "x", "message" => 1}},
          %{"id" => 1, "result" => %{}, "error" => %{"code" => 1, "message" => ""}},
          %{"id" => 1},
          %{"id" => 1, "jsonrpc" => "1.0", "result" => %{}}
        ] do
      assert {:answer, :who, {:error, %Error{name: :internal_error}}} = said(conn, answer)
    end
  end

  test "a code that nobody knows is an internal error, with its text", %{conn: conn} do
    assert {:answer, :who, {:error, %Error{name: :internal_error, message: "seven"}}} =
             said(conn, %{"id" => 1, "error" => %{"code" => 7, "message" => "seven"}})
  end

  test "what is nobody's is dropped, and counted", %{conn: conn} do
    for data <- [
          %{"id" => 7, "result" => %{}},
          %{"id" => "1", "result" => %{}},
          %{"id" => 1.0, "result" => %{}},
          [],
          7,
          nil,
          %{}
        ] do
      assert {:dropped, _why} = said(conn, data)
    end

    assert {:dropped, :unknown} = said(conn, %{"id" => 1, "result" => %{}}, comm: "another")

    {conn, {:dropped, :bad_signature}} =
      Conn.receive(conn, List.replace_at(frames("comm_msg", %{}), 2, String.duplicate("0", 64)))

    assert conn.dropped == 1
    assert Conn.owner(conn, 1) == :who
  end

  test "a callback is passed on with its command; whoever's parameters it has, it is answered", %{conn: conn} do
    assert {:callback, 1, 5, "session.get", %{"name" => "x"}, []} =
             said(conn, %{"id" => 5, "method" => "session.get", "params" => %{"command" => 1, "name" => "x"}})

    for params <- [[1], 7, nil, %{"command" => "1"}, %{"command" => 1.0}] do
      assert {:callback, nil, 5, "session.get", %{}, []} =
               said(conn, %{"id" => 5, "method" => "session.get", "params" => params})
    end

    assert {:dropped, :malformed_message} = said(conn, %{"id" => "5", "method" => "session.get", "params" => %{}})
    assert {:dropped, :malformed_message} = said(conn, %{"method" => "command.chunk", "params" => 1})
  end

  test "output is that of the command whose message is its parent", %{conn: conn} do
    output = fn msg_id, content ->
      frames("stream", content, parent: JSON.encode!(%{"msg_id" => msg_id}) |> IO.iodata_to_binary())
    end

    text = %{"name" => "stdout", "text" => "x"}
    assert {_, {:output, 1, "stdout", "x"}} = Conn.receive(conn, output.("#{conn.session}_1", text))

    for msg_id <- [
          "",
          "1",
          "another_1",
          "#{conn.session}_",
          "#{conn.session}_1x",
          conn.session <> "_" <> String.duplicate("9", 100_000),
          7
        ] do
      assert {_, {:output, nil, "stdout", "x"}} = Conn.receive(conn, output.(msg_id, text))
    end

    for content <- [%{}, %{"name" => "stdin", "text" => "x"}, %{"name" => "stdout", "text" => 7}] do
      assert {_, {:dropped, :unknown}} = Conn.receive(conn, output.("#{conn.session}_1", content))
    end
  end

  test "a display is one of the right shape", %{conn: conn} do
    for content <- [%{}, %{"data" => 1}, %{"data" => %{}, "transient" => "x"}, %{"data" => %{}, "transient" => [1]}] do
      assert {_, {:dropped, _}} = Conn.receive(conn, frames("display_data", content))
    end

    assert {_, {:display, nil, %{"data" => %{}}, true}} =
             Conn.receive(conn, frames("update_display_data", %{"data" => %{}}))
  end

  test "what is larger than the kernel takes is refused before it is sent, an answer by an error", %{conn: conn} do
    conn = %{conn | limits: %{"max_message_bytes" => 100_000}}
    large = :binary.copy("x", 50_000)
    assert {:error, %Error{name: :limit_exceeded}} = Conn.request(conn, :who, "function.call", "{}", [large])
    {_conn, {:shell, sent}} = Conn.answer(conn, 5, {:ok, "{}", [large]})
    assert IO.iodata_to_binary(sent) =~ "-32014"
  end

  test "ids rise and none is used twice", %{conn: conn} do
    {conn, _out} = Conn.notify(conn, :control, "command.cancel", %{"command" => 1})
    {conn, _out} = Conn.answer(conn, 9, {:ok, "{}", []})
    assert {:ok, _conn, 4, _out} = Conn.request(conn, :other, "function.call", "{}", [])
  end
end
